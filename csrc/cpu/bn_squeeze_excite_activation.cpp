// u = pre(a ⊙ x + b), computed from x in every pass over the map; only an expensive u is left in y between forward's
// two.
#include "bn_squeeze_excite.h"

namespace se_ext::cpu {

void forward_behind_activation(const BnForward& f) {
  const FeatureMap& x = f.x;
  const std::int64_t N = x.samples, C = f.e.channels(), M = f.e.hidden_channels(), slab = x.slab_elements();
  const Activation pre = f.names.pre, post = f.names.post;
  const NormKernels& vectors = f.v.kernels();
  Reduction tiles(x, f.schedule);
  Scratch scratch(tiles.scratch_items() + N * M + 2 * C + N * C, 5, x.accumulation_options());
  tiles.use(scratch.take(tiles.scratch_items()));
  const Pointer h_at = scratch.take(N * M), a_at = scratch.take(C), b_at = scratch.take(C);
  const Pointer dropped_at = scratch.take(N * C);  // scale · drop_scale
  const ops::SavedExcitation& saved = f.saved.excitation;
  const Pointer z_at(saved.z), hidden_at(saved.hidden), scale_at(saved.scale);
  const Pointer residual_at = pointer(f.residual), y_at(f.y), drop_at = pointer(f.drop);
  vectors.coefficients(f.v.of(x), a_at.base, b_at.base);

  // An expensive u is left in y between the two passes, where y is as precise as u.
  const bool u_is_in_y = !is_cheap(pre) && x.tensor.scalar_type() == f.v.type;
  const MapKernels& plain = kernels().map[static_cast<int>(x.dtype)];
  const PrologueKernels& map = kernels().prologue[static_cast<int>(x.dtype)];
  f.run([&](Team team, int index, std::int64_t first, std::int64_t samples) {
    tiles.reduce(team, index, first, samples, x.slab.points, z_at, [&](std::int64_t n, Tile tile, void* sums) {
      map.squeeze(x.slab, tile, {x.sample(n), a_at.base, b_at.base, pre}, u_is_in_y ? y_at.at(n * slab) : nullptr,
                  sums);
    });
    f.e.forward(team, first, samples, z_at, hidden_at, h_at, scale_at);
    for_each_sample(team, first, samples, [&](std::int64_t n) {
      vectors.product(C, scale_at.at(n * C), drop_at.at(n), nullptr, dropped_at.at(n * C));
    });
    tiles.apply(team, first, samples, [&](std::int64_t n, Tile tile) {
      const void* residual = residual_at.at(n * slab);
      void* y = y_at.at(n * slab);
      if (u_is_in_y) {
        plain.rescale(x.slab, tile, {y, dropped_at.at(n * C), residual, y, post, /*streaming=*/false});
      } else {
        map.rescale(
            x.slab, tile,
            {{x.sample(n), a_at.base, b_at.base, pre}, dropped_at.at(n * C), residual, y, post, f.schedule.streaming});
      }
    });
  });
}

void backward_behind_activation(const BnBackward& b) {
  const FeatureMap& x = b.x;
  const std::int64_t N = x.samples, C = b.e.channels(), M = b.e.hidden_channels(), slab = x.slab_elements();
  const bool batch_statistics = b.a.batch_statistics;
  const Normalization norm = b.v.of(x);
  const NormKernels& vectors = b.v.kernels();
  constexpr int kSums = 5;
  Reduction tiles(x, b.schedule, kSums);
  Scratch scratch(tiles.scratch_items() + 2 * N * M + (3 + kSums) * N * C + (5 + kSums) * C, 13,
                  x.accumulation_options());
  tiles.use(scratch.take(tiles.scratch_items()));
  const Pointer h_at = scratch.take(N * M), grad_hidden_at = scratch.take(N * M);
  const Pointer grad_t_at = scratch.take(N * C), grad_z_at = scratch.take(N * C), sums_at = scratch.take(kSums * N * C);
  const Pointer dropped_at = scratch.take(N * C);  // scale · drop_scale
  const Pointer a_at = scratch.take(C), b_at = scratch.take(C);
  const BnBackward::Totals totals{scratch.take(kSums * C), scratch.take(C), scratch.take(C), scratch.take(C)};
  const Pointer hidden_at(b.hidden), scale_at(b.scale), drop_at = pointer(b.drop);
  const Pointer grad_at(b.grad), saved_at = pointer(b.saved_map);
  const Pointer gx_at = pointer(b.grad_input()), gr_at = pointer(b.grad_residual());
  vectors.coefficients(norm, a_at.base, b_at.base);
  b.e.activate(N, hidden_at, h_at);

  // Slopes are left in the gradients' maps at full precision. A slope that is left multiplies: only where no kink stops
  // a gradient.
  const bool is_exact = x.tensor.scalar_type() == b.v.type;
  const bool leaves_slopes = b.grad_input().defined() && is_exact && !is_cheap(b.names.pre) &&
                             b.grad_residual().defined() == (b.names.post != Activation::Identity);
  const auto at_sample = [&](std::int64_t n) {
    return PrologueBackward{{x.sample(n), a_at.base, b_at.base, b.names.pre},
                            grad_at.at(n * slab),
                            dropped_at.at(n * C),
                            saved_at.at(n * slab),
                            grad_z_at.at(n * C),
                            batch_statistics ? norm.mean : totals.offset.base,  // else it is zeros
                            a_at.base,
                            batch_statistics ? totals.slope.base : nullptr,
                            totals.offset.base,
                            gx_at.at(n * slab),
                            gr_at.at(n * slab),
                            b.names.post,
                            b.schedule.streaming,
                            leaves_slopes};
  };

  const PrologueKernels& map = kernels().prologue[static_cast<int>(x.dtype)];
  const auto write = [&](Team team, std::int64_t first, std::int64_t samples) {
    tiles.apply(team, first, samples,
                [&](std::int64_t n, Tile tile) { map.backward_apply(x.slab, tile, at_sample(n)); });
  };
  const bool writes = b.grad_input().defined() || (b.grad_residual().defined() && !leaves_slopes);
  if (!batch_statistics) std::memset(totals.offset.base, 0, C * totals.offset.item_bytes);

  b.schedule.run(N, [&](Team team, int index, std::int64_t first, std::int64_t samples) {
    for_each_sample(team, first, samples, [&](std::int64_t n) {
      vectors.product(C, scale_at.at(n * C), drop_at.at(n), nullptr, dropped_at.at(n * C));
    });
    tiles.reduce(team, index, first, samples, 1, sums_at,
                 [&](std::int64_t n, Tile tile, void* sums) { map.backward_sums(x.slab, tile, at_sample(n), sums); });
    for_each_sample(team, first, samples, [&](std::int64_t n) {
      vectors.product(C, sums_at.at(kSums * n * C), drop_at.at(n), nullptr, grad_t_at.at(n * C));
    });
    b.e.backward(team, first, samples, x.slab.points, scale_at, hidden_at, h_at, grad_t_at, grad_hidden_at, grad_z_at);
    if (b.needs_totals()) {
      for_each_sample(team, first, samples, [&](std::int64_t n) {
        vectors.sums_behind_activation(C, dropped_at.at(n * C), grad_z_at.at(n * C), sums_at.at(kSums * n * C));
      });
    }
    if (writes && !batch_statistics) write(team, first, samples);
  });
  if (b.needs_totals()) b.finish(sums_at, kSums, totals);
  if (writes && batch_statistics) {
    b.schedule.run_backwards(
        N, [&](Team team, int, std::int64_t first, std::int64_t samples) { write(team, first, samples); });
  }
  b.e.weight_gradients(N, Pointer(b.z), h_at, grad_t_at, grad_hidden_at, {b.to[3], b.to[4], b.to[5], b.to[6]});
}

}  // namespace se_ext::cpu
