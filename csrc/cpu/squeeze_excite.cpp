// The whole block. A block of samples stays in cache from the pass that reduces it to the pass that rewrites it.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../checks.h"
#include "../names.h"
#include "excitation.h"
#include "schedule.h"
#include "scratch.h"

namespace se_ext::cpu {
namespace {

using at::Tensor;
using checks::OptionalTensor;

// What forward leaves for backward: z [N, C], hidden [N, M], scale [N, C], in the accumulation type.
struct Small {
  Tensor z, hidden, scale;
};

// y = post(s ⊙ x + residual), y in x's layout; y may be x. Fills `small` where somebody wants it.
void forward(const FeatureMap& x, const Excitation& e, const OptionalTensor& residual, Activation post, const Tensor& y,
             const Small* small) {
  const std::int64_t N = x.samples, C = e.channels(), M = e.hidden_channels(), slab = x.slab_elements();
  const auto type = accumulation_type(x.tensor.scalar_type());
  const Tensor r = residual.has_value() ? x.in_my_layout(*residual) : Tensor();
  const Pointer residual_at = r.defined() ? Pointer(r) : Pointer(), y_at(y);

  const Schedule schedule = Schedule::of(x, r.defined() ? 3 : 2, e.weight_bytes());
  Reduction tiles(x, schedule, type);
  Scratch scratch(tiles.scratch_items() + N * M + (small ? 0 : N * (2 * C + M)), 5, x.tensor.options().dtype(type));
  tiles.use(scratch.take(tiles.scratch_items()));
  const Pointer h_at = scratch.take(N * M);
  const Pointer z_at = small ? Pointer(small->z) : scratch.take(N * C);
  const Pointer hidden_at = small ? Pointer(small->hidden) : scratch.take(N * M);
  const Pointer scale_at = small ? Pointer(small->scale) : scratch.take(N * C);

  const bool streaming = schedule.streaming && !y.is_same(x.tensor);
  const MapKernels& map = kernels().map[static_cast<int>(x.dtype)];
  schedule.run(N, [&](Team team, int index, std::int64_t first, std::int64_t samples) {
    tiles.reduce(team, index, first, samples, x.slab.points, z_at,
                 [&](std::int64_t n, Tile tile, void* sums) { map.squeeze(x.slab, tile, x.sample(n), sums); });
    e.forward(team, first, samples, z_at, hidden_at, h_at, scale_at);
    tiles.apply(team, first, samples, [&](std::int64_t n, Tile tile) {
      map.rescale(x.slab, tile,
                  {x.sample(n), scale_at.at(n * C), residual_at.at(n * slab), y_at.at(n * slab), post, streaming});
    });
  });
}

// (y, z, hidden, scale): what backward needs besides the inputs.
std::tuple<Tensor, Tensor, Tensor, Tensor> squeeze_excite_forward(const Tensor& input, const Tensor& w1,
                                                                  const OptionalTensor& b1, const Tensor& w2,
                                                                  const OptionalTensor& b2, std::string_view activation,
                                                                  std::string_view gate, const OptionalTensor& residual,
                                                                  std::string_view post_activation) {
  const char* op = "squeeze_excite";
  checks::squeeze_excite(op, input, {w1, b1, w2, b2, activation, gate}, residual, post_activation);
  const FeatureMap x(input);
  const Excitation e(w1, b1, w2, b2, parse_activation(op, "activation", activation), parse_gate(op, gate));
  const auto type = accumulation_type(input.scalar_type());
  Small small{empty_matrix(x.samples, e.channels(), x.tensor, type),
              empty_matrix(x.samples, e.hidden_channels(), x.tensor, type),
              empty_matrix(x.samples, e.channels(), x.tensor, type)};
  Tensor y = empty_map_like(x.tensor);
  forward(x, e, residual, parse_activation(op, "post_activation", post_activation), y, &small);
  return {y, small.z, small.hidden, small.scale};
}

Tensor squeeze_excite(const Tensor& input, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                      const OptionalTensor& b2, std::string_view activation, std::string_view gate,
                      const OptionalTensor& residual, std::string_view post_activation) {
  const char* op = "squeeze_excite";
  checks::squeeze_excite(op, input, {w1, b1, w2, b2, activation, gate}, residual, post_activation);
  const FeatureMap x(input);
  const Excitation e(w1, b1, w2, b2, parse_activation(op, "activation", activation), parse_gate(op, gate));
  Tensor y = empty_map_like(x.tensor);
  forward(x, e, residual, parse_activation(op, "post_activation", post_activation), y, nullptr);
  return y;
}

void squeeze_excite_(Tensor& input, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                     const OptionalTensor& b2, std::string_view activation, std::string_view gate,
                     const OptionalTensor& residual, std::string_view post_activation) {
  const char* op = "squeeze_excite_";
  checks::squeeze_excite_in_place(input, {w1, b1, w2, b2, activation, gate}, residual, post_activation);
  const FeatureMap x(input);
  const Excitation e(w1, b1, w2, b2, parse_activation(op, "activation", activation), parse_gate(op, gate));
  forward(x, e, residual, parse_activation(op, "post_activation", post_activation), x.tensor, nullptr);
  if (!x.tensor.is_same(input)) input.copy_(x.tensor);
}

// (grad_input, grad_w1, grad_b1, grad_w2, grad_b2, grad_residual), those that the mask asks for.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> squeeze_excite_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
    const OptionalTensor& b2, const Tensor& z_, const Tensor& hidden_, const Tensor& scale_,
    const OptionalTensor& saved, std::string_view activation, std::string_view gate, std::string_view post_activation,
    std::array<bool, 6> mask) {
  const char* op = "squeeze_excite";
  checks::squeeze_excite_backward(grad_output, input, {w1, b1, w2, b2, activation, gate}, {z_, hidden_, scale_}, saved,
                                  post_activation);
  const auto type = accumulation_type(input.scalar_type());
  const FeatureMap x(input);
  const Excitation e(w1, b1, w2, b2, parse_activation(op, "activation", activation), parse_gate(op, gate));
  const std::int64_t N = x.samples, C = e.channels(), M = e.hidden_channels(), slab = x.slab_elements();
  const Tensor g = x.in_my_layout(grad_output);
  const Tensor kept = saved.has_value() ? x.in_my_layout(*saved) : Tensor();
  const Tensor z = z_.contiguous(), hidden = hidden_.contiguous(), scale = scale_.contiguous();
  const Schedule schedule = Schedule::of(x, kept.defined() ? 4 : 3, e.weight_bytes());
  Reduction tiles(x, schedule, type);
  Scratch scratch(tiles.scratch_items() + 2 * N * (C + M), 5, x.tensor.options().dtype(type));
  tiles.use(scratch.take(tiles.scratch_items()));
  const Pointer h_at = scratch.take(N * M), grad_hidden_at = scratch.take(N * M);
  const Pointer grad_t_at = scratch.take(N * C), gz_at = scratch.take(N * C);
  Excitation::Gradients grads = e.empty_gradients({mask[1], mask[2], mask[3], mask[4]});
  Tensor grad_input = mask[0] ? empty_map_like(x.tensor) : Tensor();
  Tensor grad_residual = mask[5] ? empty_map_like(x.tensor) : Tensor();

  const auto pointer = [](const Tensor& t) { return t.defined() ? Pointer(t) : Pointer(); };
  const Pointer g_at(g), s_at(scale), kept_at = pointer(kept), gx_at = pointer(grad_input),
                                      gr_at = pointer(grad_residual);
  const Activation post = parse_activation(op, "post_activation", post_activation);
  const auto at_sample = [&](std::int64_t n) {
    return RescaleBackward{g_at.at(n * slab), x.sample(n),        s_at.at(n * C),     kept_at.at(n * slab),
                           gz_at.at(n * C),   gx_at.at(n * slab), gr_at.at(n * slab), post,
                           schedule.streaming};
  };

  e.activate(N, Pointer(hidden), h_at);
  const MapKernels& map = kernels().map[static_cast<int>(x.dtype)];
  schedule.run(N, [&](Team team, int index, std::int64_t first, std::int64_t samples) {
    tiles.reduce(team, index, first, samples, 1, grad_t_at, [&](std::int64_t n, Tile tile, void* sums) {
      map.rescale_backward_reduce(x.slab, tile, at_sample(n), sums);
    });
    e.backward(team, first, samples, x.slab.points, s_at, Pointer(hidden), h_at, grad_t_at, grad_hidden_at, gz_at);
    if (mask[0] || mask[5]) {
      tiles.apply(team, first, samples,
                  [&](std::int64_t n, Tile tile) { map.rescale_backward_apply(x.slab, tile, at_sample(n)); });
    }
  });
  e.weight_gradients(N, Pointer(z), h_at, grad_t_at, grad_hidden_at, grads);
  return {grad_input, grads.w1, grads.b1, grads.w2, grads.b2, grad_residual};
}

TORCH_LIBRARY_IMPL(se_ext, CPU, m) {
  m.impl("squeeze_excite", squeeze_excite);
  m.impl("squeeze_excite_", squeeze_excite_);
  m.impl("_squeeze_excite_forward", squeeze_excite_forward);
  m.impl("_squeeze_excite_backward", squeeze_excite_backward);
}

}  // namespace
}  // namespace se_ext::cpu
