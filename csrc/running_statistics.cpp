// bn_squeeze_excite as a module calls it: with running statistics, which training updates and evaluation reads. Written
// in ATen operators and the op itself, so that autograd, autocast and torch.compile see those; in C++ because half a
// dozen operators on [C] vectors, called one by one from Python, take as long as the kernels do on a small map.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "allocate.h"
#include "ops.h"

namespace se_ext {
namespace {

using at::Tensor;
using checks::OptionalTensor;

constexpr const char* kOp = "bn_squeeze_excite";

// What the batch norm is with given statistics: a = weight / sqrt(var + eps), b = bias - mean a, [C], in the
// accumulation type. Gradients flow to weight and bias.
std::pair<Tensor, Tensor> fold(const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                               const Tensor& var, double eps, at::ScalarType type) {
  Tensor a = at::rsqrt(var.to(type) + eps);
  if (weight.has_value()) a = a * weight->to(type);
  const Tensor product = mean.to(type) * a;
  return {a, bias.has_value() ? bias->to(type) - product : at::neg(product)};
}

// running += part · (of_batch - running), part being momentum, or 1 / batches where there is none.
void update(const Tensor& running, const Tensor& of_batch, std::optional<double> momentum,
            const OptionalTensor& batches) {
  const auto moved = [&](auto&& lerp) {
    return momentum.has_value() ? lerp(at::Scalar(*momentum))
                                : lerp(at::reciprocal(batches->to(of_batch.scalar_type())));
  };
  if (running.scalar_type() == of_batch.scalar_type()) {
    moved([&](const auto& part) { return running.lerp_(of_batch, part); });
  } else {
    running.copy_(moved([&](const auto& part) { return running.to(of_batch.scalar_type()).lerp_(of_batch, part); }));
  }
}

Tensor with_running_statistics(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& running_mean, const OptionalTensor& running_var,
                               const OptionalTensor& batches, const Tensor& w1, const OptionalTensor& b1,
                               const Tensor& w2, const OptionalTensor& b2, bool training,
                               std::optional<double> momentum, double eps, std::string_view pre_activation,
                               std::string_view activation, std::string_view gate, const OptionalTensor& residual,
                               std::string_view post_activation, const OptionalTensor& drop_scale) {
  checks::running_statistic(kOp, "running_mean", running_mean, input);
  checks::running_statistic(kOp, "running_var", running_var, input);
  if (!training) {
    TORCH_CHECK(running_mean.has_value() && running_var.has_value(), kOp,
                ": expected running_mean and running_var when training is False, got None");
    const auto [a, b] = fold(weight, bias, *running_mean, *running_var, eps, accumulation_type(input.scalar_type()));
    return std::get<0>(ops::bn_squeeze_excite().call(input, a, b, w1, b1, w2, b2, /*batch_statistics=*/false, eps,
                                                     pre_activation, activation, gate, residual, post_activation,
                                                     drop_scale));
  }
  const auto [output, mean, var] =
      ops::bn_squeeze_excite().call(input, weight, bias, w1, b1, w2, b2, /*batch_statistics=*/true, eps, pre_activation,
                                    activation, gate, residual, post_activation, drop_scale);
  if (batches.has_value()) batches->add_(1);
  const c10::SymInt values = input.sym_numel() / input.sym_size(1).max(1);  // per channel
  if (values > 1 && (momentum.has_value() || batches.has_value())) {
    if (running_mean.has_value()) update(*running_mean, mean, momentum, batches);
    if (running_var.has_value()) {
      const c10::SymFloat unbiased = static_cast<c10::SymFloat>(values) / static_cast<c10::SymFloat>(values - 1);
      update(*running_var, var * at::Scalar(unbiased), momentum, batches);
    }
  }
  return output;
}

TORCH_LIBRARY_IMPL(se_ext, CompositeImplicitAutograd, m) {
  m.impl("_bn_squeeze_excite_running", with_running_statistics);
}
// For torch.func, which transforms what the op is made of.
TORCH_LIBRARY_IMPL(se_ext, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("_bn_squeeze_excite_running", with_running_statistics);
}

}  // namespace
}  // namespace se_ext
