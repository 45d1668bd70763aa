#include "convolution.h"

#include <ATen/Functions.h>

#include <vector>

#include "../ops/allocate.h"
#include "../ops/convolution.h"
#include "formula.h"

namespace se_ext::formula {
namespace {

// What ATen's convolution takes: as many zeros on both sides, or an input to which they are added before.
struct Arguments {
  Tensor input, weight;
  std::vector<c10::SymInt> stride, dilation, padding, none;
  std::vector<c10::SymInt> added;  // to the input, as constant_pad_nd takes it; empty: nothing
  c10::SymInt channels;

  Arguments(const ops::DepthwiseConv& a, at::ScalarType type)
      : input(a.input.to(type)), weight(a.weight.to(type)), channels(a.input.sym_size(1)) {
    bool is_even = true;
    const ConvolvedDims dims = convolved_dims(a);
    for (const ConvolvedDim& d : dims) {
      stride.emplace_back(d.stride);
      dilation.emplace_back(d.dilation);
      padding.push_back(d.begin);
      none.emplace_back(0);
      is_even = is_even && d.begin == d.end;
    }
    if (is_even) return;
    for (auto d = dims.rbegin(); d != dims.rend(); ++d) {
      added.push_back(d->begin);
      added.push_back(d->end);
    }
    padding = none;
    input = at::constant_pad_nd_symint(input, added);
  }

  // A gradient of the input, without what was added to it.
  Tensor without_added(Tensor grad) const {
    if (added.empty() || !grad.defined()) return grad;
    for (std::size_t i = 0; i < none.size(); ++i) {
      const auto dim = grad.dim() - 1 - static_cast<std::int64_t>(i);
      const c10::SymInt size = grad.sym_size(dim) - added[2 * i] - added[2 * i + 1];
      grad = at::narrow_symint(grad, dim, added[2 * i], size);
    }
    return grad;
  }
};

Tensor convolution(const ops::DepthwiseConv& a, at::ScalarType type) {
  const Arguments c(a, type);
  const OptionalTensor bias = a.bias.has_value() ? OptionalTensor(a.bias->to(type)) : OptionalTensor();
  return at::convolution_symint(c.input, c.weight, bias, c.stride, c.padding, c.dilation, /*transposed=*/false, c.none,
                                c.channels);
}

// Differentiable in each argument.
std::array<Tensor, 3> convolution_backward(const ops::DepthwiseConvBackward& a, at::ScalarType type) {
  const ops::DepthwiseConv& f = a.forward;
  const Arguments c(f, type);
  const std::array<c10::SymInt, 1> bias_sizes{c.channels};
  const auto bias = f.bias.has_value() ? at::OptionalSymIntArrayRef(bias_sizes) : at::OptionalSymIntArrayRef();
  auto [input, weight, bias_gradient] =
      at::convolution_backward_symint(a.grad_output.to(type), c.input, c.weight, bias, c.stride, c.padding, c.dilation,
                                      /*transposed=*/false, c.none, c.channels, a.mask);
  // Of what ATen gives, what was asked for.
  const auto wanted = [&](std::size_t i, const Tensor& grad, const Tensor& of) {
    return a.mask[i] && grad.defined() ? grad.to(of.scalar_type()) : Tensor();
  };
  return {wanted(0, c.without_added(input), f.input), wanted(1, weight, f.weight), wanted(2, bias_gradient, f.weight)};
}

// With the strides of a fresh tensor (one of no memory), which the fake kernels promise: where a dim has one point or
// there are none, ATen leaves others.
Tensor as_fresh(const Tensor& t, const Tensor& fresh) {
  if (t.strides() == fresh.strides() && t.storage_offset() == 0) return t;
  return at::empty_strided(t.sizes(), fresh.strides(), t.options()).copy_(t);
}

// The type to compute in. On the CPU ATen sums half types in themselves.
at::ScalarType summed_type(const Tensor& input) {
  return input.is_cpu() ? accumulation_type(input.scalar_type()) : input.scalar_type();
}

at::TensorOptions without_memory(const Tensor& t) {
  return t.options().device(at::kMeta);
}

}  // namespace

Tensor native_convolution(const ops::DepthwiseConv& a) {
  const Tensor y = convolution(a, summed_type(a.input)).to(a.input.scalar_type());
  return as_fresh(y, empty_convolved(a, without_memory(y)));
}

std::array<Tensor, 3> native_convolution_backward(const ops::DepthwiseConvBackward& a) {
  const Tensor& input = a.forward.input;
  auto [of_input, of_weight, of_bias] = convolution_backward(a, summed_type(input));
  if (of_input.defined()) of_input = as_fresh(of_input, empty_map_like(input, without_memory(input)));
  if (of_weight.defined()) of_weight = as_fresh(of_weight, at::empty(of_weight.sizes(), without_memory(of_weight)));
  return {of_input, of_weight, of_bias};
}

Tensor compute(const ops::DepthwiseConv& a) {
  a.check();
  const Tensor y = convolution(a, accumulation_type(a.input.scalar_type())).to(a.input.scalar_type());
  // ATen chooses the layout, which torch.func's tensors cannot be asked to change.
  constexpr c10::DispatchKeySet transformed{c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper};
  return y.key_set().has_any(transformed) ? y : y.contiguous(native_format(a.input));
}

std::array<Tensor, 3> compute(const ops::DepthwiseConvBackward& a) {
  a.check();
  return convolution_backward(a, accumulation_type(a.forward.input.scalar_type()));
}

}  // namespace se_ext::formula
