// The in-place ops for compilers and exporters, which trace programs without mutation: the functional op, and a copy
// into the input that functionalisation understands. The traced graph holds the functional op alone.
//
// Without these kernels torch makes the ops functional by itself, and its compiler decides where a copy of the input is
// needed. Inductor (2.13, frozen convolutions) takes that copy by the strides that tracing saw, after it has changed
// the layout of the convolution's output: a silently wrong result, whatever the op's schema says.
#include <torch/library.h>

#include "ops.h"

namespace se_ext {
namespace {

using at::Tensor;
using checks::OptionalTensor;

void rescale_(Tensor& input, const Tensor& scale, const OptionalTensor& residual, std::string_view post_activation) {
  checks::rescale_in_place(input, scale, residual, post_activation);
  input.copy_(ops::rescale().call(input, scale, residual, post_activation));
}

void squeeze_excite_(Tensor& input, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                     const OptionalTensor& b2, std::string_view activation, std::string_view gate,
                     const OptionalTensor& residual, std::string_view post_activation) {
  checks::squeeze_excite_in_place(input, {w1, b1, w2, b2, activation, gate}, residual, post_activation);
  input.copy_(ops::squeeze_excite().call(input, w1, b1, w2, b2, activation, gate, residual, post_activation));
}

TORCH_LIBRARY_IMPL(se_ext, Functionalize, m) {
  m.impl("rescale_", rescale_);
  m.impl("squeeze_excite_", squeeze_excite_);
}

}  // namespace
}  // namespace se_ext
