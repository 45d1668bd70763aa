#include "maps.h"

namespace se_ext {

template <>
void Backend<Cuda>::rescale(const ops::Rescale& a, const ops::Activations& activations, const Tensor& y) {
  using namespace cuda;
  const FeatureMap x = aligned_map(a.input);
  const MapOutput out(x, a.input, y);
  const Tensor scale = vector_in(a.scale, x.accumulation_type()), r = aligned_like(x, a.tail.residual);
  C10_CUDA_CHECK(write_rescale(batch_of(x, is_streaming(x, r.defined() ? 3 : 2)),
                               {data(x.tensor), data(scale), data(r), writable(out.tensor), activations.post}));
  out.write_back();
}

template <>
void Backend<Cuda>::rescale_backward(const ops::RescaleBackward& a, const ops::Activations& activations,
                                     const Gradients<3>& to) {
  using namespace cuda;
  const FeatureMap x = aligned_map(a.forward.input);
  const auto& [grad_input, grad_scale, grad_residual] = to;
  const Tensor scale = vector_in(a.forward.scale, x.accumulation_type()), g = aligned_like(x, a.grad_output);
  const Tensor saved = aligned_like(x, a.forward.tail.residual);
  const RescaleBackward maps{data(g),
                             data(x.tensor),
                             data(scale),
                             data(saved),
                             /*grad_mean=*/nullptr,
                             writable(grad_input),
                             writable(grad_residual),
                             activations.post};
  const Batch batch = batch_of(x, is_streaming(x, saved.defined() ? 4 : 3));
  if (grad_scale.defined()) {
    const InType sums(grad_scale, x.accumulation_type());
    const std::int64_t partials = partial_items(batch, x.samples, 1);
    Scratch scratch(partials, 1, x.accumulation_options());
    C10_CUDA_CHECK(sum_rescale_backward(batch, maps, {writable(sums.tensor), scratch.take(partials), 1}));
    sums.write_back();
  }
  if (grad_input.defined() || grad_residual.defined()) C10_CUDA_CHECK(write_rescale_backward(batch, maps));
}

}  // namespace se_ext
