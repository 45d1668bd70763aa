#include "../ops/adapters.h"
#include "schedule.h"
#include "scratch.h"

namespace se_ext {

template <>
void Backend<Cpu>::rescale(const ops::Rescale& a, const ops::Activations& activations, const Tensor& y) {
  using namespace cpu;
  const FeatureMap x(a.input);
  const MapOutput out(x, a.input, y);
  const Tensor s = a.scale.to(x.accumulation_type()).contiguous();
  const Tensor r = x.in_my_layout(a.tail.residual);
  const Pointer scale_at(s), y_at(out.tensor), residual_at = pointer(r);
  const std::int64_t slab = x.slab_elements();

  const MapKernels& map = kernels().map[static_cast<int>(x.dtype)];
  const Schedule schedule = Schedule::of(x, 2, 0);
  const bool streaming = schedule.streaming && !out.is_input();
  const Tiles tiles(x);
  schedule.run(x.samples, [&](Team team, int, std::int64_t first, std::int64_t samples) {
    tiles.apply(team, first, samples, [&](std::int64_t n, Tile tile) {
      map.rescale(x.slab, tile,
                  {x.sample(n), scale_at.at(n * x.slab.channels), residual_at.at(n * slab), y_at.at(n * slab),
                   activations.post, streaming});
    });
  });
  out.write_back();
}

template <>
void Backend<Cpu>::rescale_backward(const ops::RescaleBackward& a, const ops::Activations& activations,
                                    const Gradients<3>& to) {
  using namespace cpu;
  const FeatureMap x(a.forward.input);
  const auto& [grad_input, grad_scale, grad_residual] = to;
  const Tensor scale = a.forward.scale.to(x.accumulation_type()).contiguous();
  const Tensor g = x.in_my_layout(a.grad_output), saved = x.in_my_layout(a.forward.tail.residual);
  const Schedule schedule = Schedule::of(x, 3, 0);
  Reduction tiles(x, schedule);
  const std::int64_t C = x.slab.channels, slab = x.slab_elements();
  Scratch scratch(tiles.scratch_items() + C, 2, x.accumulation_options());
  tiles.use(scratch.take(tiles.scratch_items()));
  const Pointer no_mean_at = scratch.take(C);
  std::memset(no_mean_at.base, 0, C * no_mean_at.item_bytes);

  const Pointer g_at(g), scale_at(scale), saved_at = pointer(saved);
  const Pointer gx_at = pointer(grad_input), gr_at = pointer(grad_residual);
  const auto at_sample = [&](std::int64_t n) {
    return RescaleBackward{g_at.at(n * slab),     x.sample(n),      scale_at.at(n * C),
                           saved_at.at(n * slab), no_mean_at.base,  gx_at.at(n * slab),
                           gr_at.at(n * slab),    activations.post, schedule.streaming};
  };

  const MapKernels& map = kernels().map[static_cast<int>(x.dtype)];
  const std::optional<InType> sums =
      grad_scale.defined() ? std::optional<InType>(std::in_place, grad_scale, x.accumulation_type()) : std::nullopt;
  schedule.run(x.samples, [&](Team team, int index, std::int64_t first, std::int64_t samples) {
    if (sums) {
      tiles.reduce(team, index, first, samples, 1, Pointer(sums->tensor), [&](std::int64_t n, Tile tile, void* to_n) {
        map.rescale_backward_reduce(x.slab, tile, at_sample(n), to_n);
      });
    }
    if (grad_input.defined() || grad_residual.defined()) {
      tiles.apply(team, first, samples,
                  [&](std::int64_t n, Tile tile) { map.rescale_backward_apply(x.slab, tile, at_sample(n)); });
    }
  });
  if (sums) sums->write_back();
}

}  // namespace se_ext
