// The spatial dims of a convolution, as its arguments describe them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include "allocate.h"
#include "ops.h"

namespace se_ext {

struct ConvolvedDim {
  c10::SymInt in, kernel, out;
  std::int64_t stride, dilation;
  c10::SymInt begin, end;  // zeros in front of the input, and behind it

  // From the first to the last value that a filter meets.
  c10::SymInt reach() const { return (kernel - 1) * dilation + 1; }
};
using ConvolvedDims = c10::SmallVector<ConvolvedDim, 3>;

// Of arguments whose lists are of a length that check() lets through: one value for all dims, or one a dim; of padding
// also two a dim, and none for "same": an output of ceil(in / stride), and the zeros that this takes, the odd one
// behind (as TensorFlow has it).
inline ConvolvedDims convolved_dims(const ops::DepthwiseConv& a) {
  const auto dims = static_cast<std::size_t>(a.input.dim() - 2);
  const auto of = [](at::IntArrayRef list, std::size_t d) { return list.size() == 1 ? list[0] : list[d]; };
  ConvolvedDims all;
  for (std::size_t d = 0; d < dims; ++d) {
    const auto size = static_cast<std::int64_t>(d + 2);
    ConvolvedDim c{a.input.sym_size(size), a.weight.sym_size(size), 0, of(a.stride, d), of(a.dilation, d), 0, 0};
    if (a.padding.empty()) {
      c.out = (c.in + (c.stride - 1)) / c.stride;
      const c10::SymInt total = ((c.out - 1) * c.stride + c.reach() - c.in).max(0);
      c.begin = total / 2;
      c.end = total - c.begin;
    } else {
      const bool has_pairs = dims > 0 && a.padding.size() == 2 * dims;
      c.begin = has_pairs ? a.padding[2 * d] : of(a.padding, d);
      c.end = has_pairs ? a.padding[2 * d + 1] : of(a.padding, d);
      c.out = (c.in + c.begin + c.end - c.reach()) / c.stride + 1;
    }
    all.push_back(std::move(c));
  }
  return all;
}

// [N, C, *out]
inline c10::SmallVector<c10::SymInt, 5> convolved_sizes(const ops::DepthwiseConv& a) {
  c10::SmallVector<c10::SymInt, 5> sizes{a.input.sym_size(0), a.input.sym_size(1)};
  for (ConvolvedDim& d : convolved_dims(a)) sizes.push_back(std::move(d.out));
  return sizes;
}

// Whether the output has the input's sizes, whatever these are: a compiler need not prove anything of them.
inline bool keeps_sizes(const ops::DepthwiseConv& a) {
  for (const ConvolvedDim& d : convolved_dims(a)) {
    if (d.stride != 1) return false;
    if (!a.padding.empty() && d.begin + d.end != d.reach() - 1) return false;
  }
  return true;
}

// An uninitialised output in the input's memory format. Where the sizes leave the format open, it has the strides of
// the input, if it keeps the sizes.
inline Tensor empty_convolved(const ops::DepthwiseConv& a, const at::TensorOptions& options) {
  if (keeps_sizes(a)) return empty_map_like(a.input, options);
  return at::empty_symint(convolved_sizes(a), options, native_format(a.input));
}
inline Tensor empty_convolved(const ops::DepthwiseConv& a) {
  return empty_convolved(a, a.input.options());
}

}  // namespace se_ext
