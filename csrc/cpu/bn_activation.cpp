// A batch normalisation and an activation without a block behind them: y = activation(a ⊙ x + b).
#include "normalization.h"
#include "schedule.h"
#include "scratch.h"

namespace se_ext {

template <>
void Backend<Cpu>::bn_activation(const ops::BnActivation& a, const ops::Activations& activations, const Tensor& y,
                                 const Statistics& statistics) {
  using namespace cpu;
  const FeatureMap x(a.input);
  const std::int64_t C = x.slab.channels, slab = x.slab_elements();
  Vectors v(a.norm(), x.accumulation_type());
  if (a.batch_statistics) statistics_of_batch(x, v, a.eps, statistics, /*sample_means=*/Tensor());

  Scratch scratch(2 * C, 2, x.accumulation_options());
  const Pointer a_at = scratch.take(C), b_at = scratch.take(C), y_at(y);
  v.kernels().coefficients(v.of(x), a_at.base, b_at.base);
  const Schedule schedule = Schedule::of(x, 2, 0);
  const Tiles tiles(x);
  const PrologueKernels& map = kernels().prologue[static_cast<int>(x.dtype)];
  schedule.run_backwards(x.samples, [&](Team team, int, std::int64_t first, std::int64_t samples) {
    tiles.apply(team, first, samples, [&](std::int64_t n, Tile tile) {
      map.rescale(x.slab, tile,
                  {{x.sample(n), a_at.base, b_at.base, Activation::Identity},
                   /*scale=*/nullptr,
                   /*residual=*/nullptr,
                   y_at.at(n * slab),
                   activations.post,
                   schedule.streaming});
    });
  });
}

// One pass sums up what the normalisation's gradient needs, another writes. The slope of the activation is taken from
// x, anew in each pass: y is not read.
template <>
void Backend<Cpu>::bn_activation_backward(const ops::BnActivationBackward& a, const ops::Activations& activations,
                                          const Gradients<3>& to) {
  using namespace cpu;
  const FeatureMap x(a.forward.input);
  const auto& [grad_input, grad_weight, grad_bias] = to;
  const bool batch_statistics = a.forward.batch_statistics;
  const std::int64_t N = x.samples, C = x.slab.channels, slab = x.slab_elements();
  Vectors v(a.forward.norm(), x.accumulation_type());
  if (batch_statistics) v.use(a.saved);
  const Normalization norm = v.of(x);
  const Tensor g = x.in_my_layout(a.grad_output);

  const Schedule schedule = Schedule::of(x, 3, 0);
  Reduction tiles(x, schedule, 2);
  Scratch scratch(tiles.scratch_items() + 2 * N * C + 8 * C, 9, x.accumulation_options());
  tiles.use(scratch.take(tiles.scratch_items()));
  const Pointer sums_at = scratch.take(2 * N * C), totals_at = scratch.take(2 * C);
  const Pointer a_at = scratch.take(C), b_at = scratch.take(C), zeros_at = scratch.take(C);
  const Pointer grad_weight_at = scratch.take(C), slope_at = scratch.take(C), offset_at = scratch.take(C);
  v.kernels().coefficients(norm, a_at.base, b_at.base);
  std::memset(zeros_at.base, 0, C * zeros_at.item_bytes);

  const Pointer g_at(g), gx_at = pointer(grad_input);
  const PrologueKernels& map = kernels().prologue[static_cast<int>(x.dtype)];
  const auto at_sample = [&](std::int64_t n) {
    return PrologueBackward{{x.sample(n), a_at.base, b_at.base, Activation::Identity},
                            g_at.at(n * slab),
                            /*scale=*/nullptr,
                            /*saved=*/nullptr,
                            /*grad_mean=*/nullptr,
                            batch_statistics ? norm.mean : zeros_at.base,
                            a_at.base,
                            batch_statistics ? slope_at.base : nullptr,
                            batch_statistics ? offset_at.base : zeros_at.base,
                            gx_at.at(n * slab),
                            /*grad_residual=*/nullptr,
                            activations.post,
                            schedule.streaming};
  };
  if (batch_statistics || grad_weight.defined() || grad_bias.defined()) {
    schedule.run(N, [&](Team team, int index, std::int64_t first, std::int64_t samples) {
      tiles.reduce(team, index, first, samples, 1, sums_at,
                   [&](std::int64_t n, Tile tile, void* sums) { map.backward_sums(x.slab, tile, at_sample(n), sums); });
    });
    v.sums().sum_samples(N, 2 * C, sums_at.base, totals_at.base);
    v.kernels().backward_coefficients(norm, totals_at.base, grad_weight_at.base, slope_at.base, offset_at.base);
    write_gradient(x, grad_weight_at, grad_weight);
    write_gradient(x, totals_at, grad_bias);
  }
  if (grad_input.defined()) {
    schedule.run_backwards(N, [&](Team team, int, std::int64_t first, std::int64_t samples) {
      tiles.apply(team, first, samples,
                  [&](std::int64_t n, Tile tile) { map.backward_apply(x.slab, tile, at_sample(n)); });
    });
  }
}

}  // namespace se_ext
