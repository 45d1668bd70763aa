// The whole block, by the path that plan.cpp chooses.
#include "excitation.h"
#include "plan.h"

namespace se_ext {

template <>
void Backend<Cuda>::squeeze_excite(const ops::SqueezeExcite& a, const ops::Activations& activations, const Tensor& y,
                                   const ops::SavedExcitation* saved) {
  using namespace cuda;
  const FeatureMap x = aligned_map(a.input);
  const MapOutput out(x, a.input, y);
  const cuda::Excitation e(a.excitation, activations);
  const std::int64_t N = x.samples, C = e.channels(), M = e.hidden_channels();
  const Tensor r = aligned_like(x, a.tail.residual);
  const int maps = r.defined() ? 3 : 2;
  const Batch batch = batch_of(x, is_streaming(x, maps));
  Work work = e.work(x, 1, maps - 1);
  work.cluster_op = ClusterOp::Forward;
  const Plan plan = Plan::of(work, current_device());
  RescaleMaps rescale{data(x.tensor), nullptr, data(r), writable(out.tensor), activations.post};
  if (plan.path == Path::Cluster) {
    const ClusterExcitation excitation{e.first(), e.second(), saved ? writable(saved->z) : nullptr,
                                       saved ? writable(saved->hidden) : nullptr,
                                       saved ? writable(saved->scale) : nullptr};
    C10_CUDA_CHECK(write_by_cluster(batch, plan.cluster, excitation, rescale, nullptr, nullptr));
  } else {
    const std::int64_t partials = partial_items(batch, N, 1);
    Scratch scratch(partials + N * M + (saved ? 0 : N * 2 * C), 4, x.accumulation_options());
    void* const partials_at = scratch.take(partials);
    void* const h = scratch.take(N * M);
    void* const z = saved ? writable(saved->z) : scratch.take(N * C);
    void* const scale = saved ? writable(saved->scale) : scratch.take(N * C);
    void* const hidden = saved ? writable(saved->hidden) : nullptr;
    const Sums sums{z, partials_at, static_cast<double>(x.slab.points)};
    rescale.scale = scale;
    for_each_chunk(batch, plan.chunk, [&](const Batch& part) {
      C10_CUDA_CHECK(sum_input(part, rescale.x, sums));
      e.forward({z, hidden, h, scale}, part.first, part.samples, part.stream);
      C10_CUDA_CHECK(write_rescale(part, rescale));
    });
  }
  out.write_back();
}

template <>
void Backend<Cuda>::squeeze_excite_backward(const ops::SqueezeExciteBackward& a, const ops::Activations& activations,
                                            const Gradients<6>& to) {
  using namespace cuda;
  const FeatureMap x = aligned_map(a.forward.input);
  const cuda::Excitation e(a.forward.excitation, activations);
  const auto type = x.accumulation_type();
  const auto& [grad_input, grad_w1, grad_b1, grad_w2, grad_b2, grad_residual] = to;
  const std::int64_t N = x.samples, C = e.channels(), M = e.hidden_channels();
  const Tensor g = aligned_like(x, a.grad_output), saved = aligned_like(x, a.forward.tail.residual);
  const Tensor z = vector_in(a.saved.z, type), hidden = vector_in(a.saved.hidden, type);
  const Tensor scale = vector_in(a.saved.scale, type);

  const int read = saved.defined() ? 3 : 2, written = grad_input.defined() + grad_residual.defined();
  const Batch batch = batch_of(x, is_streaming(x, read + written));
  Work work = e.work(x, read, written);
  if (written > 0) work.cluster_op = ClusterOp::Backward;
  const Plan plan = Plan::of(work, current_device());
  const bool by_cluster = plan.path == Path::Cluster;
  const std::int64_t partials = by_cluster ? 0 : partial_items(batch, N, 1), passing = by_cluster ? 0 : N * C;
  Scratch scratch(partials + 2 * N * M + N * C + 2 * passing, 6, x.accumulation_options());
  const Sums sums{scratch.take(passing), scratch.take(partials), 1};
  void* const grad_z = scratch.take(passing);
  void* const grad_t = scratch.take(N * C);
  void* const h = scratch.take(N * M);
  void* const grad_hidden = scratch.take(N * M);
  const cuda::Excitation::Backward vectors{grad_t, data(hidden), h, grad_hidden, grad_z, x.slab.points};
  const RescaleBackward maps{
      data(g),         data(x.tensor), data(scale), data(saved), grad_z, writable(grad_input), writable(grad_residual),
      activations.post};
  if (by_cluster) {
    const ClusterExcitationBackward excitation{e.first(), e.second(), data(hidden), grad_t, h, grad_hidden};
    C10_CUDA_CHECK(write_backward_by_cluster(batch, plan.cluster, excitation, maps));
  } else {
    for_each_chunk(batch, plan.chunk, [&](const Batch& part) {
      C10_CUDA_CHECK(sum_rescale_backward(part, maps, sums));
      C10_CUDA_CHECK(gate_gradient(e.gate(), type == at::kDouble, sums.sums, data(scale), grad_t, part.first * C,
                                   part.samples * C, part.stream));
      e.backward(vectors, part.first, part.samples, part.stream);
      if (written > 0) C10_CUDA_CHECK(write_rescale_backward(part, maps));
    });
  }
  e.weight_gradients({grad_w1, grad_b1, grad_w2, grad_b2}, vectors, data(z), N, batch.stream);
}

}  // namespace se_ext
