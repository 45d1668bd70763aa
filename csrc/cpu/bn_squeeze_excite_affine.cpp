// u = a ⊙ x + b: the squeeze follows from each sample's mean of x, and y = post((s a) ⊙ x + s b + residual). Backward
// needs of the map Σ gv and Σ gv ⊙ x alone.
#include "bn_squeeze_excite.h"

namespace se_ext::cpu {

void forward_behind_affine(const ops::BnSqueezeExcite& a, const ops::Activations& activations, const Tensor& y,
                           const ops::SavedBnSqueezeExcite& saved, const Tensor& var) {
  BnForward f(a, activations, y, saved, var, /*rows=*/2);
  const std::int64_t C = f.C;
  const Pointer scaled_a_at = f.scratch.take(f.N * C), scaled_b_at = f.scratch.take(f.N * C);  // each sample's
  const Normalization norm = f.v.of(f.x);
  const NormKernels& vectors = f.v.kernels();
  const MapKernels& plain = kernels().map[static_cast<int>(f.x.dtype)];
  const PrologueKernels& map = kernels().prologue[static_cast<int>(f.x.dtype)];
  f.run([&](Team team, int index, std::int64_t first, std::int64_t samples) {
    if (!f.batch_statistics) {  // which found the means already
      f.tiles.reduce(
          team, index, first, samples, f.x.slab.points, f.means_at,
          [&](std::int64_t n, Tile tile, void* sums) { plain.squeeze(f.x.slab, tile, f.x.sample(n), sums); });
    }
    for_each_sample(team, first, samples,
                    [&](std::int64_t n) { vectors.squeeze_from_mean(norm, f.means_at.at(n * C), f.z_at.at(n * C)); });
    f.e.forward(team, first, samples, f.z_at, f.hidden_at, f.h_at, f.scale_at);
    for_each_sample(team, first, samples, [&](std::int64_t n) {
      vectors.product(C, f.scale_at.at(n * C), f.drop_at.at(n), f.a_at.base, scaled_a_at.at(n * C));
      vectors.product(C, f.scale_at.at(n * C), f.drop_at.at(n), f.b_at.base, scaled_b_at.at(n * C));
    });
    f.tiles.apply(team, first, samples, [&](std::int64_t n, Tile tile) {
      map.rescale(f.x.slab, tile,
                  {{f.x.sample(n), scaled_a_at.at(n * C), scaled_b_at.at(n * C), Activation::Identity},
                   /*scale=*/nullptr,
                   f.residual_at.at(n * f.slab),
                   f.y_at.at(n * f.slab),
                   f.post,
                   f.streaming});
    });
  });
  f.out.write_back();
}

void backward_behind_affine(const ops::BnSqueezeExciteBackward& a, const ops::Activations& activations,
                            const Gradients<8>& to) {
  constexpr int kSums = 2;
  BnBackward b(a, activations, to, kSums, /*rows=*/3);
  const std::int64_t C = b.C;
  const Pointer scaled_a_at = b.scratch.take(b.N * C), scaled_b_at = b.scratch.take(b.N * C);  // as in forward
  const Pointer sample_offset_at = b.scratch.take(b.N * C);                                    // of gx
  const NormKernels& vectors = b.v.kernels();
  const PrologueKernels& map = kernels().prologue[static_cast<int>(b.x.dtype)];

  // gv is left in the residual's gradient at full precision, or where a ReLU makes it the gradient or nothing.
  const bool leaves_slopes =
      b.grad_residual().defined() && (b.is_exact() ? b.post != Activation::Identity : b.post == Activation::Relu);
  const auto at_sample = [&](std::int64_t n) {
    return PrologueBackward{{b.x.sample(n), scaled_a_at.at(n * C), scaled_b_at.at(n * C), Activation::Identity},
                            b.grad_at.at(n * b.slab),
                            b.dropped_at.at(n * C),
                            b.saved_at.at(n * b.slab),
                            b.grad_z_at.at(n * C),
                            b.batch_statistics ? b.norm.mean : b.offset_at.base,  // else it is zeros
                            scaled_a_at.at(n * C),
                            b.batch_statistics ? b.slope_at.base : nullptr,
                            sample_offset_at.at(n * C),
                            b.gx_at.at(n * b.slab),
                            b.gr_at.at(n * b.slab),
                            b.post,
                            b.schedule.streaming,
                            leaves_slopes};
  };
  const auto sum = [&](Team team, int index, std::int64_t first, std::int64_t samples) {
    for_each_sample(team, first, samples, [&](std::int64_t n) {
      vectors.product(C, b.scale_at.at(n * C), b.drop_at.at(n), nullptr, b.dropped_at.at(n * C));
      vectors.product(C, b.dropped_at.at(n * C), nullptr, b.a_at.base, scaled_a_at.at(n * C));
      vectors.product(C, b.dropped_at.at(n * C), nullptr, b.b_at.base, scaled_b_at.at(n * C));
    });
    b.tiles.reduce(team, index, first, samples, 1, b.sums_at, [&](std::int64_t n, Tile tile, void* sums) {
      map.backward_sums(b.x.slab, tile, at_sample(n), sums);
    });
    for_each_sample(team, first, samples, [&](std::int64_t n) {
      vectors.scale_gradient(b.norm, b.sums_at.at(kSums * n * C), b.drop_at.at(n), b.grad_t_at.at(n * C));
    });
    b.backward_of_excitation(team, first, samples);
    if (!b.needs_totals()) return;
    for_each_sample(team, first, samples, [&](std::int64_t n) {
      vectors.sums_behind_scale(b.norm, b.dropped_at.at(n * C), b.grad_z_at.at(n * C), b.means_at.at(n * C),
                                b.sums_at.at(kSums * n * C));
    });
  };
  const auto write = [&](Team team, std::int64_t first, std::int64_t samples) {
    for_each_sample(team, first, samples, [&](std::int64_t n) {
      vectors.offset_of_sample(C, b.grad_z_at.at(n * C), b.a_at.base, b.batch_statistics ? b.offset_at.base : nullptr,
                               sample_offset_at.at(n * C));
    });
    b.tiles.apply(team, first, samples,
                  [&](std::int64_t n, Tile tile) { map.backward_apply(b.x.slab, tile, at_sample(n)); });
  };
  b.run(sum, b.grad_input().defined() || (b.grad_residual().defined() && !leaves_slopes), write);
}

}  // namespace se_ext::cpu
