#include <torch/library.h>

#include "../checks.h"
#include "../names.h"
#include "schedule.h"
#include "scratch.h"

namespace se_ext::cpu {
namespace {

using at::Tensor;
using checks::OptionalTensor;

// y = post(scale ⊙ x + residual), y in x's layout; y may be x.
void run(const FeatureMap& x, const Tensor& scale, const OptionalTensor& residual, Activation post, const Tensor& y) {
  const Tensor s = scale.to(accumulation_type(x.tensor.scalar_type())).contiguous();
  const Tensor r = residual.has_value() ? x.in_my_layout(*residual) : Tensor();
  const Pointer scale_at(s), y_at(y), residual_at = r.defined() ? Pointer(r) : Pointer();
  const std::int64_t slab = x.slab_elements();

  const MapKernels& map = kernels().map[static_cast<int>(x.dtype)];
  const Schedule schedule = Schedule::of(x, 2, 0);
  const bool streaming = schedule.streaming && !y.is_same(x.tensor);
  const Tiles tiles(x);
  schedule.run(x.samples, [&](Team team, int, std::int64_t first, std::int64_t samples) {
    tiles.apply(team, first, samples, [&](std::int64_t n, Tile tile) {
      map.rescale(x.slab, tile,
                  {x.sample(n), scale_at.at(n * x.slab.channels), residual_at.at(n * slab), y_at.at(n * slab), post,
                   streaming});
    });
  });
}

Tensor rescale(const Tensor& input, const Tensor& scale, const OptionalTensor& residual,
               std::string_view post_activation) {
  checks::rescale("rescale", input, scale, residual, post_activation);
  const FeatureMap x(input);
  Tensor y = empty_map_like(x.tensor);
  run(x, scale, residual, parse_activation("rescale", "post_activation", post_activation), y);
  return y;
}

void rescale_(Tensor& input, const Tensor& scale, const OptionalTensor& residual, std::string_view post_activation) {
  checks::rescale_in_place(input, scale, residual, post_activation);
  const FeatureMap x(input);
  run(x, scale, residual, parse_activation("rescale_", "post_activation", post_activation), x.tensor);
  if (!x.tensor.is_same(input)) input.copy_(x.tensor);
}

std::tuple<Tensor, Tensor, Tensor> rescale_backward(const Tensor& grad_output, const Tensor& input, const Tensor& scale,
                                                    const OptionalTensor& saved, std::string_view post_activation,
                                                    std::array<bool, 3> mask) {
  checks::rescale_backward(grad_output, input, scale, saved, post_activation);
  const FeatureMap x(input);
  const auto type = accumulation_type(input.scalar_type());
  const Tensor s = scale.to(type).contiguous();
  const Tensor g = x.in_my_layout(grad_output);
  const Tensor kept = saved.has_value() ? x.in_my_layout(*saved) : Tensor();
  const Schedule schedule = Schedule::of(x, 3, 0);
  Reduction tiles(x, schedule, type);
  const std::int64_t C = x.slab.channels;
  Scratch scratch(tiles.scratch_items() + C, 2, input.options().dtype(type));
  tiles.use(scratch.take(tiles.scratch_items()));
  const Pointer no_mean_at = scratch.take(C);
  std::memset(no_mean_at.base, 0, C * no_mean_at.item_bytes);
  const Tensor grad_scale = empty_matrix(x.samples, C, input, type);
  Tensor grad_input = mask[0] ? empty_map_like(x.tensor) : Tensor();
  Tensor grad_residual = mask[2] ? empty_map_like(x.tensor) : Tensor();

  const auto pointer = [](const Tensor& t) { return t.defined() ? Pointer(t) : Pointer(); };
  const Pointer g_at(g), s_at(s), kept_at = pointer(kept), gx_at = pointer(grad_input), gr_at = pointer(grad_residual);
  const std::int64_t slab = x.slab_elements();
  const Activation post = parse_activation("rescale", "post_activation", post_activation);
  const auto at_sample = [&](std::int64_t n) {
    return RescaleBackward{g_at.at(n * slab), x.sample(n),        s_at.at(n * C),     kept_at.at(n * slab),
                           no_mean_at.base,   gx_at.at(n * slab), gr_at.at(n * slab), post,
                           schedule.streaming};
  };

  const MapKernels& map = kernels().map[static_cast<int>(x.dtype)];
  schedule.run(x.samples, [&](Team team, int index, std::int64_t first, std::int64_t samples) {
    if (mask[1]) {
      tiles.reduce(team, index, first, samples, 1, Pointer(grad_scale), [&](std::int64_t n, Tile tile, void* sums) {
        map.rescale_backward_reduce(x.slab, tile, at_sample(n), sums);
      });
    }
    if (mask[0] || mask[2]) {
      tiles.apply(team, first, samples,
                  [&](std::int64_t n, Tile tile) { map.rescale_backward_apply(x.slab, tile, at_sample(n)); });
    }
  });
  return {grad_input, mask[1] ? grad_scale.to(scale.scalar_type()) : Tensor(), grad_residual};
}

TORCH_LIBRARY_IMPL(se_ext, CPU, m) {
  m.impl("rescale", rescale);
  m.impl("rescale_", rescale_);
  m.impl("_rescale_backward", rescale_backward);
}

}  // namespace
}  // namespace se_ext::cpu
