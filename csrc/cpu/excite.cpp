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

  Schedule::of(N, e.weight_bytes() * N).run(N, [&](Team team, int, std::int64_t first, std::int64_t samples) {
    e.forward(team, first, samples, Pointer(z), Pointer(hidden), Pointer(h), Pointer(s.tensor));
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

  e.activate(N, Pointer(hidden), Pointer(h));
  Schedule::of(N, e.weight_bytes() * N).run(N, [&](Team team, int, std::int64_t first, std::int64_t samples) {
    e.backward(team, first, samples, 1, Pointer(scale), Pointer(hidden), Pointer(h), Pointer(grad_t),
               Pointer(grad_hidden), Pointer(gz.tensor));
  });
  e.weight_gradients(N, Pointer(z), Pointer(h), Pointer(grad_t), Pointer(grad_hidden),
                     {grad_w1, grad_b1, grad_w2, grad_b2});
  gz.write_back();
}

}  // namespace se_ext
