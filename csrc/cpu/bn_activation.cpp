// A batch normalisation and an activation without a block behind them: y = activation(a ⊙ x + b).
#include <torch/library.h>

#include "../checks.h"
#include "../names.h"
#include "normalization.h"
#include "schedule.h"
#include "scratch.h"

namespace se_ext::cpu {
namespace {

using at::Tensor;
using checks::OptionalTensor;

constexpr const char* kOp = "bn_activation";

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_activation(const Tensor& input, const OptionalTensor& weight,
                                                         const OptionalTensor& bias, bool batch_statistics, double eps,
                                                         std::string_view activation_) {
  checks::bn_activation(kOp, input, weight, bias, batch_statistics, activation_);
  const FeatureMap x(input);
  const std::int64_t C = x.slab.channels, slab = x.slab_elements();
  const Activation activation = parse_activation(kOp, "activation", activation_);
  Vectors v(weight, bias, accumulation_type(input.scalar_type()));
  const Statistics found = Statistics::empty(x, v.type, batch_statistics, /*of_samples=*/false);
  const Tensor y = empty_map_like(x.tensor);
  if (batch_statistics) statistics_of_batch(x, v, eps, found);

  Scratch scratch(2 * C, 2, x.tensor.options().dtype(v.type));
  const Pointer a_at = scratch.take(C), b_at = scratch.take(C), y_at(y);
  v.kernels().coefficients(v.of(x), a_at.base, b_at.base);
  const Schedule schedule = Schedule::of(x, 2, 0);
  const Tiles tiles(x);
  const AffineKernels& map = kernels().affine[static_cast<int>(x.dtype)];
  schedule.run_backwards(x.samples, [&](Team team, int, std::int64_t first, std::int64_t samples) {
    tiles.apply(team, first, samples, [&](std::int64_t n, Tile tile) {
      map.rescale(x.slab, tile,
                  {{x.sample(n), a_at.base, b_at.base, Activation::Identity},
                   /*scale=*/nullptr,
                   /*residual=*/nullptr,
                   y_at.at(n * slab),
                   activation,
                   schedule.streaming});
    });
  });
  return {y, found.mean, found.var, found.inverse};
}

// One pass sums up what the normalisation's gradient needs, another writes. The slope of the activation is taken from
// x, anew in each pass: y is not read.
std::tuple<Tensor, Tensor, Tensor> bn_activation_backward(const Tensor& grad_output, const Tensor& input,
                                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                                          const Tensor& mean, const Tensor& inverse,
                                                          bool batch_statistics, double /*eps*/,
                                                          std::string_view activation_, std::array<bool, 3> mask) {
  checks::bn_activation_backward(grad_output, input, weight, bias, mean, inverse, batch_statistics, activation_);
  const FeatureMap x(input);
  const std::int64_t N = x.samples, C = x.slab.channels, slab = x.slab_elements();
  const Activation activation = parse_activation(kOp, "activation", activation_);
  Vectors v(weight, bias, accumulation_type(input.scalar_type()));
  if (batch_statistics) {
    v.mean = mean.contiguous();
    v.inverse = inverse.contiguous();
  }
  const Normalization norm = v.of(x);
  const Tensor g = x.in_my_layout(grad_output);
  const Tensor grad_input = mask[0] ? empty_map_like(x.tensor) : Tensor();

  const Schedule schedule = Schedule::of(x, 3, 0);
  Reduction tiles(x, schedule, v.type, 2);
  Scratch scratch(tiles.scratch_items() + 2 * N * C + 8 * C, 9, x.tensor.options().dtype(v.type));
  tiles.use(scratch.take(tiles.scratch_items()));
  const Pointer sums_at = scratch.take(2 * N * C), totals_at = scratch.take(2 * C);
  const Pointer a_at = scratch.take(C), b_at = scratch.take(C), zeros_at = scratch.take(C);
  const Pointer grad_weight_at = scratch.take(C), slope_at = scratch.take(C), offset_at = scratch.take(C);
  v.kernels().coefficients(norm, a_at.base, b_at.base);
  std::memset(zeros_at.base, 0, C * zeros_at.item_bytes);

  const Pointer g_at(g), gx_at = pointer(grad_input);
  const AffineKernels& map = kernels().affine[static_cast<int>(x.dtype)];
  const auto at_sample = [&](std::int64_t n) {
    return AffineBackward{{x.sample(n), a_at.base, b_at.base, Activation::Identity},
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
                          activation,
                          schedule.streaming};
  };
  Tensor grad_weight, grad_bias;
  if (batch_statistics || mask[1] || mask[2]) {
    schedule.run(N, [&](Team team, int index, std::int64_t first, std::int64_t samples) {
      tiles.reduce(team, index, first, samples, 1, sums_at,
                   [&](std::int64_t n, Tile tile, void* to) { map.backward_sums(x.slab, tile, at_sample(n), to); });
    });
    v.sums().sum_samples(N, 2 * C, sums_at.base, totals_at.base);
    v.kernels().backward_coefficients(norm, totals_at.base, grad_weight_at.base, slope_at.base, offset_at.base);
    if (mask[1]) grad_weight = vector_gradient(x, weight, grad_weight_at, v.type);
    if (mask[2]) grad_bias = vector_gradient(x, bias, totals_at, v.type);
  }
  if (mask[0]) {
    schedule.run_backwards(N, [&](Team team, int, std::int64_t first, std::int64_t samples) {
      tiles.apply(team, first, samples,
                  [&](std::int64_t n, Tile tile) { map.backward_apply(x.slab, tile, at_sample(n)); });
    });
  }
  return {grad_input, grad_weight, grad_bias};
}

TORCH_LIBRARY_IMPL(se_ext, CPU, m) {
  m.impl("_bn_activation", bn_activation);
  m.impl("_bn_activation_backward", bn_activation_backward);
}

}  // namespace
}  // namespace se_ext::cpu
