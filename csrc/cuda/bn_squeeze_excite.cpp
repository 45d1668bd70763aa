// The block behind a batch normalisation (or a given affine map) and an activation: u = pre(a ⊙ x + b) takes the place
// of x; it is not a tensor of its own. Where pre is the identity, the squeeze follows from each sample's mean of x.
#include "excitation.h"
#include "normalization.h"
#include "plan.h"

namespace se_ext {

template <>
void Backend<Cuda>::bn_squeeze_excite(const ops::BnSqueezeExcite& a, const ops::Activations& activations,
                                      const Tensor& y, const ops::SavedBnSqueezeExcite& saved, const Tensor& var) {
  using namespace cuda;
  const FeatureMap x = aligned_map(a.input);
  const MapOutput out(x, a.input, y);
  const cuda::Excitation e(a.excitation(), activations);
  Vectors v(a.norm(), x.accumulation_type());
  const std::int64_t N = x.samples, C = e.channels(), M = e.hidden_channels();
  const bool is_identity = activations.pre == Activation::Identity, is_double = x.dtype == DType::Float64;
  const Tensor r = aligned_like(x, a.tail.residual), drop = vector_in(a.drop_scale, x.accumulation_type());
  const int maps = r.defined() ? 3 : 2;
  const Batch batch = batch_of(x, is_streaming(x, maps));
  const std::int64_t partials = partial_items(batch, N, 1);
  Scratch scratch(partials + 2 * C + N * M, 4, x.accumulation_options());
  void* const a_at = scratch.take(C);
  void* const b_at = scratch.take(C);
  void* const partials_at = scratch.take(partials);
  void* const h = scratch.take(N * M);
  if (a.batch_statistics) {
    statistics_of_batch(x, v, a.eps, {saved.statistics.mean, var, saved.statistics.inverse}, saved.sample_means, a_at,
                        b_at);
  } else {
    C10_CUDA_CHECK(coefficients(v.of(x), is_double, a_at, b_at, batch.stream));
  }

  void* const z = writable(saved.excitation.z);
  void* const hidden = writable(saved.excitation.hidden);
  void* const scale = writable(saved.excitation.scale);
  const Prologue prologue{a_at, b_at, activations.pre};
  const RescaleMaps rescale{data(x.tensor), scale, data(r), writable(out.tensor), activations.post};
  Work work = e.work(x, 1, maps - 1);
  work.can_chunk = !is_identity;
  if (!is_identity) work.cluster_op = ClusterOp::ForwardBehindPrologue;
  const Plan plan = Plan::of(work, current_device());
  if (plan.path == Path::Cluster) {
    const ClusterExcitation excitation{e.first(), e.second(), z, hidden, scale};
    C10_CUDA_CHECK(write_by_cluster(batch, plan.cluster, excitation, rescale, &prologue, data(drop)));
    out.write_back();
    return;
  }
  const auto points = static_cast<double>(x.slab.points);
  if (is_identity) {
    void* const means = writable(saved.sample_means);
    if (!a.batch_statistics) C10_CUDA_CHECK(sum_input(batch, rescale.x, {means, partials_at, points}));
    C10_CUDA_CHECK(squeeze_from_means(v.of(x), is_double, means, z, batch.stream));
  }
  for_each_chunk(batch, plan.chunk, [&](const Batch& part) {
    if (!is_identity) C10_CUDA_CHECK(sum_prologue(part, rescale.x, prologue, {z, partials_at, points}));
    e.forward({z, hidden, h, scale}, part.first, part.samples, part.stream);
    C10_CUDA_CHECK(write_prologue_rescale(part, prologue, data(drop), rescale));
  });
  out.write_back();
}

// One pass sums up what the gradient of the scale and the normalisation need, another writes. It waits for the whole
// batch where the batch's statistics depend on x.
template <>
void Backend<Cuda>::bn_squeeze_excite_backward(const ops::BnSqueezeExciteBackward& a,
                                               const ops::Activations& activations, const Gradients<8>& to) {
  using namespace cuda;
  const FeatureMap x = aligned_map(a.forward.input);
  const cuda::Excitation e(a.forward.excitation(), activations);
  const auto& [grad_input, grad_weight, grad_bias, grad_w1, grad_b1, grad_w2, grad_b2, grad_residual] = to;
  const bool batch_statistics = a.forward.batch_statistics;
  const bool is_identity = activations.pre == Activation::Identity, is_double = x.dtype == DType::Float64;
  const std::int64_t N = x.samples, C = e.channels(), M = e.hidden_channels();
  const auto type = x.accumulation_type();
  Vectors v(a.forward.norm(), type);
  if (batch_statistics) v.use(a.saved.statistics, type);
  const Normalization norm = v.of(x);
  const Tensor g = aligned_like(x, a.grad_output), saved = aligned_like(x, a.forward.tail.residual);
  const ops::SavedExcitation& s = a.saved.excitation;
  const Tensor z = vector_in(s.z, type), hidden = vector_in(s.hidden, type), scale = vector_in(s.scale, type);
  const Tensor drop = vector_in(a.forward.drop_scale, type), sample_means = vector_in(a.saved.sample_means, type);

  const bool needs_totals = grad_weight.defined() || grad_bias.defined() || (batch_statistics && grad_input.defined());
  const int read = saved.defined() ? 3 : 2, written = grad_input.defined() + grad_residual.defined();
  const int parts = is_identity ? 2 : 5;
  const Batch batch = batch_of(x, is_streaming(x, read + written));
  const std::int64_t partials = partial_items(batch, N, parts);
  Scratch scratch(partials + 2 * N * M + (2 + parts) * N * C + 6 * C, 12, x.accumulation_options());
  const Sums sums{scratch.take(parts * N * C), scratch.take(partials), 1};
  void* const grad_t = scratch.take(N * C);
  void* const grad_z = scratch.take(N * C);
  void* const h = scratch.take(N * M);
  void* const grad_hidden = scratch.take(N * M);
  void* const a_at = scratch.take(C);
  void* const b_at = scratch.take(C);
  void* const slope = scratch.take(C);
  void* const offset = scratch.take(C);
  const VectorGradient weight(x, grad_weight, scratch.take(C)), bias(x, grad_bias, scratch.take(C));
  C10_CUDA_CHECK(coefficients(norm, is_double, a_at, b_at, batch.stream));

  const cuda::Excitation::Backward vectors{grad_t, data(hidden), h, grad_hidden, grad_z, x.slab.points};
  const RescaleBackward maps{
      data(g),         data(x.tensor), data(scale), data(saved), grad_z, writable(grad_input), writable(grad_residual),
      activations.post};
  const PrologueBackward prologue{{a_at, b_at, activations.pre},
                                  data(drop),
                                  norm.mean,
                                  batch_statistics ? slope : nullptr,
                                  batch_statistics ? offset : nullptr};
  const ScaleGradient scale_sums{sums.sums, data(scale), data(drop), grad_t, e.gate(), !is_identity};
  Work work = e.work(x, read, written);
  work.can_chunk = !batch_statistics;
  const Plan plan = Plan::of(work, current_device());
  for_each_chunk(batch, plan.chunk, [&](const Batch& part) {
    C10_CUDA_CHECK(sum_prologue_backward(part, prologue, maps, sums));
    C10_CUDA_CHECK(scale_gradient(norm, is_double, scale_sums, part.first, part.samples, part.stream));
    e.backward(vectors, part.first, part.samples, part.stream);
    if (written > 0 && !batch_statistics) C10_CUDA_CHECK(write_prologue_backward(part, prologue, maps));
  });
  if (needs_totals) {
    C10_CUDA_CHECK(batch_backward(norm, is_double,
                                  {sums.sums, data(scale), data(drop), grad_z, data(sample_means), !is_identity,
                                   weight.sums(), bias.sums(), slope, offset},
                                  batch.stream));
    weight.write_back();
    bias.write_back();
  }
  if (written > 0 && batch_statistics) C10_CUDA_CHECK(write_prologue_backward(batch, prologue, maps));
  e.weight_gradients({grad_w1, grad_b1, grad_w2, grad_b2}, vectors, data(z), N, batch.stream);
}

}  // namespace se_ext
