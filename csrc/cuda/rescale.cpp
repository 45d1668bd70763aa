#include <torch/library.h>

#include "../checks.h"
#include "../names.h"
#include "maps.h"

namespace se_ext::cuda {
namespace {

using at::Tensor;
using checks::OptionalTensor;

// y = post(scale ⊙ x + residual), y in x's layout; y may be x.
void run(const FeatureMap& x, const Tensor& scale, const OptionalTensor& residual, Activation post, const Tensor& y) {
  const Tensor s = vector_in(scale, accumulation_type(x.tensor.scalar_type()));
  const Tensor r = beside(x, residual);
  C10_CUDA_CHECK(write_rescale(batch_of(x, is_streaming(x, r.defined() ? 3 : 2)),
                               {data(x.tensor), data(s), data(r), writable(y), post}));
}

Tensor rescale(const Tensor& input, const Tensor& scale, const OptionalTensor& residual,
               std::string_view post_activation) {
  checks::rescale("rescale", input, scale, residual, post_activation);
  const c10::cuda::CUDAGuard guard(input.device());
  const FeatureMap x = aligned_map(input);
  Tensor y = empty_map_like(x.tensor);
  run(x, scale, residual, parse_activation("rescale", "post_activation", post_activation), y);
  return y;
}

void rescale_(Tensor& input, const Tensor& scale, const OptionalTensor& residual, std::string_view post_activation) {
  checks::rescale_in_place(input, scale, residual, post_activation);
  const c10::cuda::CUDAGuard guard(input.device());
  const FeatureMap x = aligned_map(input);
  run(x, scale, residual, parse_activation("rescale_", "post_activation", post_activation), x.tensor);
  if (!x.tensor.is_same(input)) input.copy_(x.tensor);
}

std::tuple<Tensor, Tensor, Tensor> rescale_backward(const Tensor& grad_output, const Tensor& input, const Tensor& scale,
                                                    const OptionalTensor& saved, std::string_view post_activation,
                                                    std::array<bool, 3> mask) {
  checks::rescale_backward(grad_output, input, scale, saved, post_activation);
  const c10::cuda::CUDAGuard guard(input.device());
  const FeatureMap x = aligned_map(input);
  const auto type = accumulation_type(input.scalar_type());
  const Tensor s = vector_in(scale, type), g = beside(x, grad_output), kept = beside(x, saved);
  const Tensor grad_input = mask[0] ? empty_map_like(x.tensor) : Tensor();
  const Tensor grad_residual = mask[2] ? empty_map_like(x.tensor) : Tensor();
  const RescaleBackward maps{data(g),
                             data(x.tensor),
                             data(s),
                             data(kept),
                             nullptr,
                             writable(grad_input),
                             writable(grad_residual),
                             parse_activation("rescale", "post_activation", post_activation)};
  const Batch batch = batch_of(x, is_streaming(x, kept.defined() ? 4 : 3));
  Tensor grad_scale;
  if (mask[1]) {
    const std::int64_t partials = partial_items(batch, x.samples, 1);
    Scratch scratch(partials, 1, input.options().dtype(type));
    grad_scale = empty_matrix(x.samples, x.slab.channels, input, type);
    C10_CUDA_CHECK(sum_rescale_backward(batch, maps, {writable(grad_scale), scratch.take(partials), 1}));
    grad_scale = grad_scale.to(scale.scalar_type());
  }
  if (mask[0] || mask[2]) C10_CUDA_CHECK(write_rescale_backward(batch, maps));
  return {grad_input, grad_scale, grad_residual};
}

TORCH_LIBRARY_IMPL(se_ext, SE_EXT_CUDA_KEY, m) {
  m.impl("rescale", rescale);
  m.impl("rescale_", rescale_);
  m.impl("_rescale_backward", rescale_backward);
}

}  // namespace
}  // namespace se_ext::cuda
