#include <ATen/ops/empty_like.h>

#include "../ops/adapters.h"
#include "excitation.h"
#include "schedule.h"

namespace se_ext {

template <>
void Backend<Cpu>::excite(const ops::Excite& a, const ops::Activations& activations, const Tensor& scale,
                          const Tensor& hidden) {
  using namespace cpu;
  const cpu::Excitation e(a.excitation, activations);
  const std::int64_t N = a.input.size(0);
  const auto type = accumulation_type(a.input.scalar_type());
  const Tensor z = a.input.to(type).contiguous();
  const Tensor h = at::empty_like(hidden);
  const InType s(scale, type);

  // Taken here, not in the parallel region: asking for the data of a tensor that is copied on write copies it.
  const Pointer z_at(z), hidden_at(hidden), h_at(h), scale_at(s.tensor);
  Schedule::of(N, e.weight_bytes() * N).run(N, [&](Team team, int, std::int64_t first, std::int64_t samples) {
    e.forward(team, first, samples, z_at, hidden_at, h_at, scale_at);
  });
  s.write_back();
}

template <>
void Backend<Cpu>::excite_backward(const ops::ExciteBackward& a, const ops::Activations& activations,
                                   const Gradients<5>& to) {
  using namespace cpu;
  const cpu::Excitation e(a.forward.excitation, activations);
  const std::int64_t N = a.forward.input.size(0);
  const auto type = accumulation_type(a.forward.input.scalar_type());
  const Tensor z = a.forward.input.to(type).contiguous();
  const Tensor scale = a.saved.scale.to(type).contiguous();
  const Tensor hidden = a.saved.hidden.contiguous();
  const Tensor h = at::empty_like(hidden), grad_hidden = at::empty_like(hidden);
  const Tensor grad_t = at::empty_like(z).copy_(a.grad_output);
  const auto& [grad_z, grad_w1, grad_b1, grad_w2, grad_b2] = to;
  const InType gz(grad_z.defined() ? grad_z : at::empty_like(z), type);

  const Pointer z_at(z), scale_at(scale), hidden_at(hidden), h_at(h);
  const Pointer grad_t_at(grad_t), grad_hidden_at(grad_hidden), gz_at(gz.tensor);
  e.activate(N, hidden_at, h_at);
  Schedule::of(N, e.weight_bytes() * N).run(N, [&](Team team, int, std::int64_t first, std::int64_t samples) {
    e.backward(team, first, samples, 1, scale_at, hidden_at, h_at, grad_t_at, grad_hidden_at, gz_at);
  });
  e.weight_gradients(N, z_at, h_at, grad_t_at, grad_hidden_at, {grad_w1, grad_b1, grad_w2, grad_b2});
  gz.write_back();
}

}  // namespace se_ext
