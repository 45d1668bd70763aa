// A batch normalisation and an activation without a block behind them: y = activation(a ⊙ x + b). The kernels are those
// of the block, with a scale of ones.
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../checks.h"
#include "../names.h"
#include "normalization.h"

namespace se_ext::cuda {
namespace {

using at::Tensor;
using checks::OptionalTensor;

constexpr const char* kOp = "bn_activation";

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_activation(const Tensor& input, const OptionalTensor& weight,
                                                         const OptionalTensor& bias, bool batch_statistics, double eps,
                                                         std::string_view activation_) {
  checks::bn_activation(kOp, input, weight, bias, batch_statistics, activation_);
  const c10::cuda::CUDAGuard guard(input.device());
  const FeatureMap x = aligned_map(input);
  const std::int64_t C = x.slab.channels;
  const Activation activation = parse_activation(kOp, "activation", activation_);
  const auto type = accumulation_type(input.scalar_type());
  const auto options = input.options().dtype(type);
  Vectors v(weight, bias, type);
  const BatchStatistics found = BatchStatistics::empty(x, type, batch_statistics, /*of_samples=*/false);
  const Tensor y = empty_map_like(x.tensor);
  const Batch batch = batch_of(x, is_streaming(x, 2));
  Scratch scratch(2 * C, 2, options);
  void* const a = scratch.take(C);
  void* const b = scratch.take(C);
  if (batch_statistics) {
    statistics_of_batch(x, v, eps, found, a, b);
  } else {
    C10_CUDA_CHECK(coefficients(v.of(x), type == at::kDouble, a, b, batch.stream));
  }
  const Tensor ones = at::ones({x.samples, C}, options);
  C10_CUDA_CHECK(write_prologue_rescale(batch, {a, b, Activation::Identity}, /*drop=*/nullptr,
                                        {data(x.tensor), data(ones), /*residual=*/nullptr, writable(y), activation}));
  return {y, found.mean, found.var, found.inverse};
}

// One pass sums up what the normalisation's gradient needs, another writes.
std::tuple<Tensor, Tensor, Tensor> bn_activation_backward(const Tensor& grad_output, const Tensor& input,
                                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                                          const Tensor& mean, const Tensor& inverse,
                                                          bool batch_statistics, double /*eps*/,
                                                          std::string_view activation_, std::array<bool, 3> mask) {
  checks::bn_activation_backward(grad_output, input, weight, bias, mean, inverse, batch_statistics, activation_);
  const c10::cuda::CUDAGuard guard(input.device());
  const FeatureMap x = aligned_map(input);
  const std::int64_t N = x.samples, C = x.slab.channels;
  const Activation activation = parse_activation(kOp, "activation", activation_);
  const auto type = accumulation_type(input.scalar_type());
  const bool is_double = type == at::kDouble;
  const auto options = input.options().dtype(type);
  Vectors v(weight, bias, type);
  if (batch_statistics) {
    v.mean = vector_in(mean, type);
    v.inverse = vector_in(inverse, type);
  }
  const Normalization norm = v.of(x);
  const Tensor g = beside(x, grad_output);
  const Tensor grad_input = mask[0] ? empty_map_like(x.tensor) : Tensor();
  const Tensor ones = at::ones({N, C}, options), zeros = at::zeros({N, C}, options);

  const Batch batch = batch_of(x, is_streaming(x, 3));
  const std::int64_t partials = partial_items(batch, N, 2);
  Scratch scratch(partials + 2 * N * C + 6 * C, 8, options);
  const Sums sums{scratch.take(2 * N * C), scratch.take(partials), 1};
  void* const a = scratch.take(C);
  void* const b = scratch.take(C);
  void* const slope = scratch.take(C);
  void* const offset = scratch.take(C);
  void* const grad_weight_at = scratch.take(C);
  void* const grad_bias_at = scratch.take(C);
  C10_CUDA_CHECK(coefficients(norm, is_double, a, b, batch.stream));

  const RescaleBackward maps{data(g),
                             data(x.tensor),
                             data(ones),
                             /*saved=*/nullptr,
                             data(zeros),
                             writable(grad_input),
                             /*grad_residual=*/nullptr,
                             activation};
  const PrologueBackward prologue{{a, b, Activation::Identity},
                                  /*drop=*/nullptr,
                                  norm.mean,
                                  batch_statistics ? slope : nullptr,
                                  batch_statistics ? offset : nullptr};
  Tensor grad_weight, grad_bias;
  if (batch_statistics || mask[1] || mask[2]) {
    C10_CUDA_CHECK(sum_prologue_backward(batch, prologue, maps, sums));
    const auto fresh = [&] { return at::empty({C}, options); };
    if (mask[1]) grad_weight = fresh();
    if (mask[2]) grad_bias = fresh();
    C10_CUDA_CHECK(batch_backward(norm, is_double,
                                  {sums.sums, data(ones), /*drop=*/nullptr, data(zeros), /*sample_means=*/data(zeros),
                                   /*has_activation=*/false, mask[1] ? writable(grad_weight) : grad_weight_at,
                                   mask[2] ? writable(grad_bias) : grad_bias_at, slope, offset},
                                  batch.stream));
    if (mask[1]) grad_weight = vector_gradient(x, weight, grad_weight);
    if (mask[2]) grad_bias = vector_gradient(x, bias, grad_bias);
  }
  if (mask[0]) C10_CUDA_CHECK(write_prologue_backward(batch, prologue, maps));
  return {grad_input, grad_weight, grad_bias};
}

TORCH_LIBRARY_IMPL(se_ext, SE_EXT_CUDA_KEY, m) {
  m.impl("_bn_activation", bn_activation);
  m.impl("_bn_activation_backward", bn_activation_backward);
}

}  // namespace
}  // namespace se_ext::cuda
