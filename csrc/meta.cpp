// The fake kernels: the checks and the allocations of the real ops, without the arithmetic. They serve meta tensors,
// FakeTensorMode, torch.compile and torch.export, with symbolic sizes.
#include <torch/library.h>

#include "allocate.h"
#include "checks.h"

namespace se_ext {
namespace {

using at::Tensor;
using checks::OptionalTensor;

Tensor squeeze(const Tensor& input) {
  checks::squeeze(input);
  return empty_matrix(input.sym_size(0), input.sym_size(1), input, input.scalar_type());
}

std::tuple<Tensor, Tensor> excite_forward(const Tensor& z, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                                          const OptionalTensor& b2, std::string_view activation,
                                          std::string_view gate) {
  checks::excite(z, {w1, b1, w2, b2, activation, gate});
  return {empty_matrix(z.sym_size(0), z.sym_size(1), z, z.scalar_type()),
          empty_matrix(z.sym_size(0), w1.sym_size(0), z, accumulation_type(z.scalar_type()))};
}

Tensor excite(const Tensor& z, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2,
              std::string_view activation, std::string_view gate) {
  return std::get<0>(excite_forward(z, w1, b1, w2, b2, activation, gate));
}

Tensor empty_if(bool wanted, const Tensor& like) {
  return wanted ? at::empty_symint(like.sym_sizes(), like.options()) : Tensor();
}

Tensor empty_if(bool wanted, const OptionalTensor& like) {
  return like.has_value() ? empty_if(wanted, *like) : Tensor();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> excite_backward(const Tensor& grad_output, const Tensor& z,
                                                                   const Tensor& w1, const OptionalTensor& b1,
                                                                   const Tensor& w2, const OptionalTensor& b2,
                                                                   const Tensor& hidden, const Tensor& scale,
                                                                   std::string_view activation, std::string_view gate,
                                                                   std::array<bool, 5> mask) {
  checks::excite_backward(grad_output, z, {w1, b1, w2, b2, activation, gate}, hidden, scale);
  return {empty_if(mask[0], z), empty_if(mask[1], w1), empty_if(mask[2], b1), empty_if(mask[3], w2),
          empty_if(mask[4], b2)};
}

Tensor rescale(const Tensor& input, const Tensor& scale, const OptionalTensor& residual,
               std::string_view post_activation) {
  checks::rescale("rescale", input, scale, residual, post_activation);
  return empty_map_like(input);
}

void rescale_(Tensor& input, const Tensor& scale, const OptionalTensor& residual, std::string_view post_activation) {
  checks::rescale_in_place(input, scale, residual, post_activation);
}

std::tuple<Tensor, Tensor, Tensor> rescale_backward(const Tensor& grad_output, const Tensor& input, const Tensor& scale,
                                                    const OptionalTensor& saved, std::string_view post_activation,
                                                    std::array<bool, 3> mask) {
  checks::rescale_backward(grad_output, input, scale, saved, post_activation);
  return {mask[0] ? empty_map_like(input) : Tensor(), empty_if(mask[1], scale),
          mask[2] ? empty_map_like(input) : Tensor()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> squeeze_excite_forward(const Tensor& input, const Tensor& w1,
                                                                  const OptionalTensor& b1, const Tensor& w2,
                                                                  const OptionalTensor& b2, std::string_view activation,
                                                                  std::string_view gate, const OptionalTensor& residual,
                                                                  std::string_view post_activation) {
  checks::squeeze_excite("squeeze_excite", input, {w1, b1, w2, b2, activation, gate}, residual, post_activation);
  const auto type = accumulation_type(input.scalar_type());
  const auto matrix = [&](c10::SymInt columns) {
    return empty_matrix(input.sym_size(0), std::move(columns), input, type);
  };
  return {empty_map_like(input), matrix(input.sym_size(1)), matrix(w1.sym_size(0)), matrix(input.sym_size(1))};
}

Tensor squeeze_excite(const Tensor& input, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                      const OptionalTensor& b2, std::string_view activation, std::string_view gate,
                      const OptionalTensor& residual, std::string_view post_activation) {
  checks::squeeze_excite("squeeze_excite", input, {w1, b1, w2, b2, activation, gate}, residual, post_activation);
  return empty_map_like(input);
}

void squeeze_excite_(Tensor& input, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                     const OptionalTensor& b2, std::string_view activation, std::string_view gate,
                     const OptionalTensor& residual, std::string_view post_activation) {
  checks::squeeze_excite_in_place(input, {w1, b1, w2, b2, activation, gate}, residual, post_activation);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> squeeze_excite_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
    const OptionalTensor& b2, const Tensor& z, const Tensor& hidden, const Tensor& scale, const OptionalTensor& saved,
    std::string_view activation, std::string_view gate, std::string_view post_activation, std::array<bool, 6> mask) {
  checks::squeeze_excite_backward(grad_output, input, {w1, b1, w2, b2, activation, gate}, {z, hidden, scale}, saved,
                                  post_activation);
  return {mask[0] ? empty_map_like(input) : Tensor(),
          empty_if(mask[1], w1),
          empty_if(mask[2], b1),
          empty_if(mask[3], w2),
          empty_if(mask[4], b2),
          mask[5] ? empty_map_like(input) : Tensor()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_squeeze_excite_forward(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& w1,
    const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2, bool batch_statistics, double,
    std::string_view pre_activation, std::string_view activation, std::string_view gate, const OptionalTensor& residual,
    std::string_view post_activation, const OptionalTensor& drop_scale) {
  checks::bn_squeeze_excite("bn_squeeze_excite", input, {weight, bias, batch_statistics, pre_activation},
                            {w1, b1, w2, b2, activation, gate}, residual, post_activation, drop_scale);
  const c10::SymInt channels = input.sym_size(1);
  const auto options = input.options().dtype(accumulation_type(input.scalar_type()));
  const auto statistic = [&] { return at::empty_symint({batch_statistics ? channels : c10::SymInt(0)}, options); };
  const auto matrix = [&](const c10::SymInt& rows, const c10::SymInt& columns) {
    return at::empty_symint({rows, columns}, options);
  };
  return {empty_map_like(input),
          statistic(),
          statistic(),
          statistic(),
          matrix(pre_activation == "identity" ? input.sym_size(0) : c10::SymInt(0), channels),
          matrix(input.sym_size(0), channels),
          matrix(input.sym_size(0), w1.sym_size(0)),
          matrix(input.sym_size(0), channels)};
}

std::tuple<Tensor, Tensor, Tensor> bn_squeeze_excite(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& w1,
    const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2, bool batch_statistics, double eps,
    std::string_view pre_activation, std::string_view activation, std::string_view gate, const OptionalTensor& residual,
    std::string_view post_activation, const OptionalTensor& drop_scale) {
  auto all = bn_squeeze_excite_forward(input, weight, bias, w1, b1, w2, b2, batch_statistics, eps, pre_activation,
                                       activation, gate, residual, post_activation, drop_scale);
  return {std::get<0>(all), std::get<1>(all), std::get<2>(all)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_squeeze_excite_backward(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& w1, const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2, const Tensor& mean,
    const Tensor& inverse, const Tensor& sample_means, const Tensor& z, const Tensor& hidden, const Tensor& scale,
    const OptionalTensor& saved, const OptionalTensor& drop_scale, bool batch_statistics, double,
    std::string_view pre_activation, std::string_view activation, std::string_view gate,
    std::string_view post_activation, std::array<bool, 8> mask) {
  checks::bn_squeeze_excite_backward(grad_output, input, {weight, bias, batch_statistics, pre_activation},
                                     {w1, b1, w2, b2, activation, gate}, {mean, inverse, sample_means},
                                     {z, hidden, scale}, saved, post_activation, drop_scale);
  return {mask[0] ? empty_map_like(input) : Tensor(),
          empty_if(mask[1], weight),
          empty_if(mask[2], bias),
          empty_if(mask[3], w1),
          empty_if(mask[4], b1),
          empty_if(mask[5], w2),
          empty_if(mask[6], b2),
          mask[7] ? empty_map_like(input) : Tensor()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_activation(const Tensor& input, const OptionalTensor& weight,
                                                         const OptionalTensor& bias, bool batch_statistics, double,
                                                         std::string_view activation) {
  checks::bn_activation("bn_activation", input, weight, bias, batch_statistics, activation);
  const c10::SymInt channels = batch_statistics ? input.sym_size(1) : c10::SymInt(0);
  const auto options = input.options().dtype(accumulation_type(input.scalar_type()));
  const auto statistic = [&] { return at::empty_symint({channels}, options); };
  return {empty_map_like(input), statistic(), statistic(), statistic()};
}

std::tuple<Tensor, Tensor, Tensor> bn_activation_backward(const Tensor& grad_output, const Tensor& input,
                                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                                          const Tensor& mean, const Tensor& inverse,
                                                          bool batch_statistics, double, std::string_view activation,
                                                          std::array<bool, 3> mask) {
  checks::bn_activation_backward(grad_output, input, weight, bias, mean, inverse, batch_statistics, activation);
  return {mask[0] ? empty_map_like(input) : Tensor(), empty_if(mask[1], weight), empty_if(mask[2], bias)};
}

TORCH_LIBRARY_IMPL(se_ext, Meta, m) {
  m.impl("squeeze", squeeze);
  m.impl("excite", excite);
  m.impl("rescale", rescale);
  m.impl("squeeze_excite", squeeze_excite);
  m.impl("rescale_", rescale_);
  m.impl("squeeze_excite_", squeeze_excite_);
  m.impl("_excite_forward", excite_forward);
  m.impl("_excite_backward", excite_backward);
  m.impl("_rescale_backward", rescale_backward);
  m.impl("_squeeze_excite_forward", squeeze_excite_forward);
  m.impl("_squeeze_excite_backward", squeeze_excite_backward);
  m.impl("bn_squeeze_excite", bn_squeeze_excite);
  m.impl("_bn_squeeze_excite_forward", bn_squeeze_excite_forward);
  m.impl("_bn_squeeze_excite_backward", bn_squeeze_excite_backward);
  m.impl("_bn_activation", bn_activation);
  m.impl("_bn_activation_backward", bn_activation_backward);
}

}  // namespace
}  // namespace se_ext
