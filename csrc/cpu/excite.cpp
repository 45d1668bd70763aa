#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../checks.h"
#include "../names.h"
#include "excitation.h"
#include "schedule.h"

namespace se_ext::cpu {
namespace {

using at::Tensor;
using checks::OptionalTensor;

// (s in z's dtype, hidden [N, M] for backward)
std::tuple<Tensor, Tensor> excite_forward(const Tensor& z, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                                          const OptionalTensor& b2, std::string_view activation,
                                          std::string_view gate) {
  checks::excite(z, {w1, b1, w2, b2, activation, gate});
  const Excitation e(w1, b1, w2, b2, parse_activation("excite", "activation", activation), parse_gate("excite", gate));
  const std::int64_t N = z.size(0);
  const auto type = accumulation_type(z.scalar_type());
  const Tensor in = z.to(type).contiguous();
  Tensor hidden = empty_matrix(N, e.hidden_channels(), z, type);
  const Tensor h = at::empty_like(hidden);
  const Tensor scale = at::empty_like(in);

  Schedule::of(N, e.weight_bytes() * N).run(N, [&](Team team, int, std::int64_t first, std::int64_t samples) {
    e.forward(team, first, samples, Pointer(in), Pointer(hidden), Pointer(h), Pointer(scale));
  });
  return {scale.to(z.scalar_type()), hidden};
}

Tensor excite(const Tensor& z, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2,
              std::string_view activation, std::string_view gate) {
  return std::get<0>(excite_forward(z, w1, b1, w2, b2, activation, gate));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> excite_backward(const Tensor& grad_output, const Tensor& z,
                                                                   const Tensor& w1, const OptionalTensor& b1,
                                                                   const Tensor& w2, const OptionalTensor& b2,
                                                                   const Tensor& hidden, const Tensor& scale,
                                                                   std::string_view activation, std::string_view gate,
                                                                   std::array<bool, 5> mask) {
  checks::excite_backward(grad_output, z, {w1, b1, w2, b2, activation, gate}, hidden, scale);
  const Excitation e(w1, b1, w2, b2, parse_activation("excite", "activation", activation), parse_gate("excite", gate));
  const std::int64_t N = z.size(0);
  const auto type = accumulation_type(z.scalar_type());
  const Tensor in = z.to(type).contiguous();
  const Tensor s = scale.to(type).contiguous();
  const Tensor saved = hidden.contiguous();
  const Tensor h = at::empty_like(saved);
  const Tensor grad_hidden = at::empty_like(saved);
  const Tensor grad_t = at::empty_like(in).copy_(grad_output);
  const Tensor grad_z = at::empty_like(in);

  e.activate(N, Pointer(saved), Pointer(h));
  Schedule::of(N, e.weight_bytes() * N).run(N, [&](Team team, int, std::int64_t first, std::int64_t samples) {
    e.backward(team, first, samples, 1, Pointer(s), Pointer(saved), Pointer(h), Pointer(grad_t), Pointer(grad_hidden),
               Pointer(grad_z));
  });
  Excitation::Gradients g = e.empty_gradients({mask[1], mask[2], mask[3], mask[4]});
  e.weight_gradients(N, Pointer(in), Pointer(h), Pointer(grad_t), Pointer(grad_hidden), g);
  return {mask[0] ? grad_z.to(z.scalar_type()) : Tensor(), g.w1, g.b1, g.w2, g.b2};
}

TORCH_LIBRARY_IMPL(se_ext, CPU, m) {
  m.impl("excite", excite);
  m.impl("_excite_forward", excite_forward);
  m.impl("_excite_backward", excite_backward);
}

}  // namespace
}  // namespace se_ext::cpu
