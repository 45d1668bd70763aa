// A batch normalisation, a shortcut and an activation without a block behind them:
// y = activation(drop_scale ⊙ (a ⊙ x + b) + residual). The kernels are those of the block, with a scale of ones.
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include "normalization.h"

namespace se_ext {

template <>
void Backend<Cuda>::bn_activation(const ops::BnActivation& a, const ops::Activations& activations, const Tensor& y,
                                  const Statistics& statistics) {
  using namespace cuda;
  const FeatureMap x = aligned_map(a.input);
  const MapOutput out(x, a.input, y);
  const std::int64_t C = x.slab.channels;
  Vectors v(a.norm(), x.accumulation_type());
  const Tensor r = aligned_like(x, a.residual), drop = vector_in(a.drop_scale, x.accumulation_type());
  const Batch batch = batch_of(x, is_streaming(x, r.defined() ? 3 : 2));
  Scratch scratch(2 * C, 2, x.accumulation_options());
  void* const a_at = scratch.take(C);
  void* const b_at = scratch.take(C);
  if (a.batch_statistics) {
    statistics_of_batch(x, v, a.eps, statistics, /*sample_means=*/Tensor(), a_at, b_at);
  } else {
    C10_CUDA_CHECK(coefficients(v.of(x), x.dtype == DType::Float64, a_at, b_at, batch.stream));
  }
  const Tensor ones = at::ones({x.samples, C}, x.accumulation_options());
  C10_CUDA_CHECK(write_prologue_rescale(batch, {a_at, b_at, Activation::Identity}, data(drop),
                                        {data(x.tensor), data(ones), data(r), writable(out.tensor), activations.post}));
  out.write_back();
}

// One pass sums up what the normalisation's gradient needs, another writes.
template <>
void Backend<Cuda>::bn_activation_backward(const ops::BnActivationBackward& a, const ops::Activations& activations,
                                           const Gradients<4>& to) {
  using namespace cuda;
  const FeatureMap x = aligned_map(a.forward.input);
  const std::int64_t N = x.samples, C = x.slab.channels;
  const auto& [grad_input, grad_weight, grad_bias, grad_residual] = to;
  const bool is_double = x.dtype == DType::Float64, batch_statistics = a.forward.batch_statistics;
  Vectors v(a.forward.norm(), x.accumulation_type());
  if (batch_statistics) v.use(a.saved, x.accumulation_type());
  const Normalization norm = v.of(x);
  const Tensor g = aligned_like(x, a.grad_output), saved = aligned_like(x, a.forward.residual);
  const Tensor drop = vector_in(a.forward.drop_scale, x.accumulation_type());
  const Tensor ones = at::ones({N, C}, x.accumulation_options()), zeros = at::zeros({N, C}, x.accumulation_options());

  const int read = saved.defined() ? 3 : 2, written = grad_input.defined() + grad_residual.defined();
  const Batch batch = batch_of(x, is_streaming(x, read + written));
  const std::int64_t partials = partial_items(batch, N, 2);
  Scratch scratch(partials + 2 * N * C + 6 * C, 8, x.accumulation_options());
  const Sums sums{scratch.take(2 * N * C), scratch.take(partials), 1};
  void* const a_at = scratch.take(C);
  void* const b_at = scratch.take(C);
  void* const slope = scratch.take(C);
  void* const offset = scratch.take(C);
  const VectorGradient weight(x, grad_weight, scratch.take(C)), bias(x, grad_bias, scratch.take(C));
  C10_CUDA_CHECK(coefficients(norm, is_double, a_at, b_at, batch.stream));

  const RescaleBackward maps{data(g),
                             data(x.tensor),
                             data(ones),
                             data(saved),
                             data(zeros),
                             writable(grad_input),
                             writable(grad_residual),
                             activations.post};
  const PrologueBackward prologue{{a_at, b_at, Activation::Identity},
                                  data(drop),
                                  norm.mean,
                                  batch_statistics ? slope : nullptr,
                                  batch_statistics ? offset : nullptr};
  if (batch_statistics || grad_weight.defined() || grad_bias.defined()) {
    C10_CUDA_CHECK(sum_prologue_backward(batch, prologue, maps, sums));
    C10_CUDA_CHECK(batch_backward(norm, is_double,
                                  {sums.sums, data(ones), data(drop), data(zeros), /*sample_means=*/data(zeros),
                                   /*has_activation=*/false, weight.sums(), bias.sums(), slope, offset},
                                  batch.stream));
    weight.write_back();
    bias.write_back();
  }
  if (written > 0) C10_CUDA_CHECK(write_prologue_backward(batch, prologue, maps));
}

}  // namespace se_ext
