// The whole block. A chunk of samples stays in cache from the pass that reduces it to the pass that rewrites it.
#include "../ops/adapters.h"
#include "excitation.h"
#include "schedule.h"
#include "scratch.h"

namespace se_ext {

template <>
void Backend<Cpu>::squeeze_excite(const ops::SqueezeExcite& a, const ops::Activations& activations, const Tensor& y,
                                  const ops::SavedExcitation* saved) {
  using namespace cpu;
  const FeatureMap x(a.input);
  const MapOutput out(x, a.input, y);
  const cpu::Excitation e(a.excitation, activations);
  const std::int64_t N = x.samples, C = e.channels(), M = e.hidden_channels(), slab = x.slab_elements();
  const Tensor r = x.in_my_layout(a.tail.residual);
  const Pointer residual_at = pointer(r), y_at(out.tensor);

  const Schedule schedule = Schedule::of(x, r.defined() ? 3 : 2, e.weight_bytes());
  Reduction tiles(x, schedule);
  Scratch scratch(tiles.scratch_items() + N * M + (saved ? 0 : N * (2 * C + M)), 5, x.accumulation_options());
  tiles.use(scratch.take(tiles.scratch_items()));
  const Pointer h_at = scratch.take(N * M);
  const Pointer z_at = saved ? Pointer(saved->z) : scratch.take(N * C);
  const Pointer hidden_at = saved ? Pointer(saved->hidden) : scratch.take(N * M);
  const Pointer scale_at = saved ? Pointer(saved->scale) : scratch.take(N * C);

  const bool streaming = schedule.streaming && !out.is_input();
  const MapKernels& map = kernels().map[static_cast<int>(x.dtype)];
  schedule.run(N, [&](Team team, int index, std::int64_t first, std::int64_t samples) {
    tiles.reduce(team, index, first, samples, x.slab.points, z_at,
                 [&](std::int64_t n, Tile tile, void* sums) { map.squeeze(x.slab, tile, x.sample(n), sums); });
    e.forward(team, first, samples, z_at, hidden_at, h_at, scale_at);
    tiles.apply(team, first, samples, [&](std::int64_t n, Tile tile) {
      map.rescale(
          x.slab, tile,
          {x.sample(n), scale_at.at(n * C), residual_at.at(n * slab), y_at.at(n * slab), activations.post, streaming});
    });
  });
  out.write_back();
}

template <>
void Backend<Cpu>::squeeze_excite_backward(const ops::SqueezeExciteBackward& a, const ops::Activations& activations,
                                           const Gradients<6>& to) {
  using namespace cpu;
  const FeatureMap x(a.forward.input);
  const cpu::Excitation e(a.forward.excitation, activations);
  const auto& [grad_input, grad_w1, grad_b1, grad_w2, grad_b2, grad_residual] = to;
  const std::int64_t N = x.samples, C = e.channels(), M = e.hidden_channels(), slab = x.slab_elements();
  const Tensor g = x.in_my_layout(a.grad_output), saved = x.in_my_layout(a.forward.tail.residual);
  const Tensor z = a.saved.z.contiguous(), hidden = a.saved.hidden.contiguous(), scale = a.saved.scale.contiguous();
  const Schedule schedule = Schedule::of(x, saved.defined() ? 4 : 3, e.weight_bytes());
  Reduction tiles(x, schedule);
  Scratch scratch(tiles.scratch_items() + 2 * N * (C + M), 5, x.accumulation_options());
  tiles.use(scratch.take(tiles.scratch_items()));
  const Pointer h_at = scratch.take(N * M), grad_hidden_at = scratch.take(N * M);
  const Pointer grad_t_at = scratch.take(N * C), gz_at = scratch.take(N * C);

  const Pointer g_at(g), scale_at(scale), saved_at = pointer(saved);
  const Pointer gx_at = pointer(grad_input), gr_at = pointer(grad_residual);
  const auto at_sample = [&](std::int64_t n) {
    return RescaleBackward{g_at.at(n * slab),     x.sample(n),      scale_at.at(n * C),
                           saved_at.at(n * slab), gz_at.at(n * C),  gx_at.at(n * slab),
                           gr_at.at(n * slab),    activations.post, schedule.streaming};
  };

  e.activate(N, Pointer(hidden), h_at);
  const MapKernels& map = kernels().map[static_cast<int>(x.dtype)];
  schedule.run(N, [&](Team team, int index, std::int64_t first, std::int64_t samples) {
    tiles.reduce(team, index, first, samples, 1, grad_t_at, [&](std::int64_t n, Tile tile, void* sums) {
      map.rescale_backward_reduce(x.slab, tile, at_sample(n), sums);
    });
    e.backward(team, first, samples, x.slab.points, scale_at, Pointer(hidden), h_at, grad_t_at, grad_hidden_at, gz_at);
    if (grad_input.defined() || grad_residual.defined()) {
      tiles.apply(team, first, samples,
                  [&](std::int64_t n, Tile tile) { map.rescale_backward_apply(x.slab, tile, at_sample(n)); });
    }
  });
  e.weight_gradients(N, Pointer(z), h_at, grad_t_at, grad_hidden_at, {grad_w1, grad_b1, grad_w2, grad_b2});
}

}  // namespace se_ext
