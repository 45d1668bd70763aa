// The formula in plain ATen operators. It serves what the kernels do not: double backward, forward-mode AD, the
// torch.func transforms, and devices without kernels. The functions differentiate through ATen's own autograd.
#pragma once

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "checks.h"

namespace se_ext::composite {

using at::Tensor;
using checks::OptionalTensor;

Tensor squeeze(const Tensor& input);
Tensor excite(const Tensor& z, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2,
              std::string_view activation, std::string_view gate);
Tensor rescale(const Tensor& input, const Tensor& scale, const OptionalTensor& residual,
               std::string_view post_activation);
Tensor squeeze_excite(const Tensor& input, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                      const OptionalTensor& b2, std::string_view activation, std::string_view gate,
                      const OptionalTensor& residual, std::string_view post_activation);

// The backward ops, differentiable in every argument. What forward saved of the small tensors is computed anew, as a
// function of the inputs, or second derivatives would miss the paths through it.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> excite_backward(const Tensor& grad_output, const Tensor& z,
                                                                   const Tensor& w1, const OptionalTensor& b1,
                                                                   const Tensor& w2, const OptionalTensor& b2,
                                                                   std::string_view activation, std::string_view gate,
                                                                   std::array<bool, 5> mask);
std::tuple<Tensor, Tensor, Tensor> rescale_backward(const Tensor& grad_output, const Tensor& input, const Tensor& scale,
                                                    const OptionalTensor& saved, std::string_view post_activation,
                                                    std::array<bool, 3> mask);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> squeeze_excite_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
    const OptionalTensor& b2, const OptionalTensor& saved, std::string_view activation, std::string_view gate,
    std::string_view post_activation, std::array<bool, 6> mask);

std::tuple<Tensor, Tensor, Tensor> bn_squeeze_excite(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& w1,
    const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2, bool batch_statistics, double eps,
    std::string_view pre_activation, std::string_view activation, std::string_view gate, const OptionalTensor& residual,
    std::string_view post_activation, const OptionalTensor& drop_scale);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_squeeze_excite_backward(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& w1, const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2, const OptionalTensor& saved,
    const OptionalTensor& drop_scale, bool batch_statistics, double eps, std::string_view pre_activation,
    std::string_view activation, std::string_view gate, std::string_view post_activation, std::array<bool, 8> mask);

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_activation(const Tensor& input, const OptionalTensor& weight,
                                                         const OptionalTensor& bias, bool batch_statistics, double eps,
                                                         std::string_view activation);
std::tuple<Tensor, Tensor, Tensor> bn_activation_backward(const Tensor& grad_output, const Tensor& input,
                                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                                          bool batch_statistics, double eps,
                                                          std::string_view activation, std::array<bool, 3> mask);

}  // namespace se_ext::composite
