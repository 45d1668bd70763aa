// u = pre(a ⊙ x + b), computed from x in every pass over the map; only an expensive u is left in y between forward's
// two.
#include "bn_squeeze_excite.h"

namespace se_ext::cpu {

void forward_behind_activation(const ops::BnSqueezeExcite& a, const ops::Activations& activations, const Tensor& y,
                               const ops::SavedBnSqueezeExcite& saved, const Tensor& var) {
  BnForward f(a, activations, y, saved, var, /*rows=*/1);
  const std::int64_t C = f.C;
  const Pointer dropped_at = f.scratch.take(f.N * C);  // scale · drop_scale
  const NormKernels& vectors = f.v.kernels();
  const MapKernels& plain = kernels().map[static_cast<int>(f.x.dtype)];
  const PrologueKernels& map = kernels().prologue[static_cast<int>(f.x.dtype)];
  // An expensive u is left in y between the two passes, where y is as precise as u, and not still to be read as the
  // residual.
  const bool u_is_in_y = !is_cheap(f.pre) && f.x.tensor.scalar_type() == f.v.type && f.residual_at.base != f.y_at.base;
  const auto prologue = [&](std::int64_t n) { return PrologueMap{f.x.sample(n), f.a_at.base, f.b_at.base, f.pre}; };
  f.run([&](Team team, int index, std::int64_t first, std::int64_t samples) {
    f.tiles.reduce(team, index, first, samples, f.x.slab.points, f.z_at, [&](std::int64_t n, Tile tile, void* sums) {
      map.squeeze(f.x.slab, tile, prologue(n), u_is_in_y ? f.y_at.at(n * f.slab) : nullptr, sums);
    });
    f.e.forward(team, first, samples, f.z_at, f.hidden_at, f.h_at, f.scale_at);
    for_each_sample(team, first, samples, [&](std::int64_t n) {
      vectors.product(C, f.scale_at.at(n * C), f.drop_at.at(n), nullptr, dropped_at.at(n * C));
    });
    f.tiles.apply(team, first, samples, [&](std::int64_t n, Tile tile) {
      const void *scale = dropped_at.at(n * C), *residual = f.residual_at.at(n * f.slab);
      void* y_of_n = f.y_at.at(n * f.slab);
      if (u_is_in_y) {
        plain.rescale(f.x.slab, tile, {y_of_n, scale, residual, y_of_n, f.post, /*streaming=*/false});
      } else {
        map.rescale(f.x.slab, tile, {prologue(n), scale, residual, y_of_n, f.post, f.streaming});
      }
    });
  });
  f.out.write_back();
}

void backward_behind_activation(const ops::BnSqueezeExciteBackward& a, const ops::Activations& activations,
                                const Gradients<8>& to) {
  constexpr int kSums = 5;
  BnBackward b(a, activations, to, kSums, /*rows=*/0);
  const std::int64_t C = b.C;
  const NormKernels& vectors = b.v.kernels();
  const PrologueKernels& map = kernels().prologue[static_cast<int>(b.x.dtype)];

  // Slopes are left in the gradients' maps at full precision. A slope that is left multiplies: only where no kink stops
  // a gradient.
  const bool leaves_slopes = b.grad_input().defined() && b.is_exact() && !is_cheap(b.pre) &&
                             b.grad_residual().defined() == (b.post != Activation::Identity);
  const auto at_sample = [&](std::int64_t n) {
    return PrologueBackward{{b.x.sample(n), b.a_at.base, b.b_at.base, b.pre},
                            b.grad_at.at(n * b.slab),
                            b.dropped_at.at(n * C),
                            b.saved_at.at(n * b.slab),
                            b.grad_z_at.at(n * C),
                            b.batch_statistics ? b.norm.mean : b.offset_at.base,  // else it is zeros
                            b.a_at.base,
                            b.batch_statistics ? b.slope_at.base : nullptr,
                            b.offset_at.base,
                            b.gx_at.at(n * b.slab),
                            b.gr_at.at(n * b.slab),
                            b.post,
                            b.schedule.streaming,
                            leaves_slopes};
  };
  const auto sum = [&](Team team, int index, std::int64_t first, std::int64_t samples) {
    for_each_sample(team, first, samples, [&](std::int64_t n) {
      vectors.product(C, b.scale_at.at(n * C), b.drop_at.at(n), nullptr, b.dropped_at.at(n * C));
    });
    b.tiles.reduce(team, index, first, samples, 1, b.sums_at, [&](std::int64_t n, Tile tile, void* sums) {
      map.backward_sums(b.x.slab, tile, at_sample(n), sums);
    });
    for_each_sample(team, first, samples, [&](std::int64_t n) {
      vectors.product(C, b.sums_at.at(kSums * n * C), b.drop_at.at(n), nullptr, b.grad_t_at.at(n * C));
    });
    b.backward_of_excitation(team, first, samples);
    if (!b.needs_totals()) return;
    for_each_sample(team, first, samples, [&](std::int64_t n) {
      vectors.sums_behind_activation(C, b.dropped_at.at(n * C), b.grad_z_at.at(n * C), b.sums_at.at(kSums * n * C));
    });
  };
  const auto write = [&](Team team, std::int64_t first, std::int64_t samples) {
    b.tiles.apply(team, first, samples,
                  [&](std::int64_t n, Tile tile) { map.backward_apply(b.x.slab, tile, at_sample(n)); });
  };
  b.run(sum, b.grad_input().defined() || (b.grad_residual().defined() && !leaves_slopes), write);
}

}  // namespace se_ext::cpu
