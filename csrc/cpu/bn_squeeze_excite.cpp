#include "bn_squeeze_excite.h"

namespace se_ext {
namespace cpu {
namespace {

// Before the call takes scratch memory, of which the pass that finds the statistics needs some.
Vectors with_statistics(const FeatureMap& x, const ops::BnSqueezeExcite& a, const ops::SavedBnSqueezeExcite& saved,
                        const Tensor& var) {
  Vectors v(a.norm(), x.accumulation_type());
  if (a.batch_statistics) {
    statistics_of_batch(x, v, a.eps, {saved.statistics.mean, var, saved.statistics.inverse}, saved.sample_means);
  }
  return v;
}

Vectors with_saved_statistics(const FeatureMap& x, const ops::BnSqueezeExciteBackward& a) {
  Vectors v(a.forward.norm(), x.accumulation_type());
  if (a.forward.batch_statistics) v.use(a.saved.statistics);
  return v;
}

}  // namespace

BnForward::BnForward(const ops::BnSqueezeExcite& a, const ops::Activations& activations, const Tensor& y,
                     const ops::SavedBnSqueezeExcite& saved, const Tensor& var, int rows)
    : batch_statistics(a.batch_statistics),
      pre(activations.pre),
      post(activations.post),
      x(a.input),
      out(x, a.input, y),
      e(a.excitation(), activations),
      N(x.samples),
      C(e.channels()),
      M(e.hidden_channels()),
      slab(x.slab_elements()),
      v(with_statistics(x, a, saved, var)),
      residual(x.in_my_layout(a.tail.residual)),
      drop(Vectors::in_type(a.drop_scale, v.type)),
      schedule(Schedule::of(x, residual.defined() ? 3 : 2, e.weight_bytes())),
      streaming(schedule.streaming && !out.is_input()),
      tiles(x, schedule),
      scratch(tiles.scratch_items() + N * M + 2 * C + rows * N * C, 4 + rows, x.accumulation_options()),
      a_at(scratch.take(C)),
      b_at(scratch.take(C)),
      h_at(scratch.take(N * M)),
      z_at(saved.excitation.z),
      hidden_at(saved.excitation.hidden),
      scale_at(saved.excitation.scale),
      means_at(saved.sample_means),
      residual_at(pointer(residual)),
      y_at(out.tensor),
      drop_at(pointer(drop)) {
  tiles.use(scratch.take(tiles.scratch_items()));
  v.kernels().coefficients(v.of(x), a_at.base, b_at.base);
}

BnBackward::BnBackward(const ops::BnSqueezeExciteBackward& a, const ops::Activations& activations,
                       const Gradients<8>& gradients, int sums, int rows)
    : batch_statistics(a.forward.batch_statistics),
      pre(activations.pre),
      post(activations.post),
      to(gradients),
      x(a.forward.input),
      e(a.forward.excitation(), activations),
      N(x.samples),
      C(e.channels()),
      M(e.hidden_channels()),
      slab(x.slab_elements()),
      v(with_saved_statistics(x, a)),
      norm(v.of(x)),
      grad(x.in_my_layout(a.grad_output)),
      saved_map(x.in_my_layout(a.forward.tail.residual)),
      z(a.saved.excitation.z.contiguous()),
      hidden(a.saved.excitation.hidden.contiguous()),
      scale(a.saved.excitation.scale.contiguous()),
      sample_means(a.saved.sample_means.contiguous()),
      drop(Vectors::in_type(a.forward.drop_scale, v.type)),
      schedule(Schedule::of(x, saved_map.defined() ? 4 : 3, e.weight_bytes())),
      parts(sums),
      tiles(x, schedule, sums),
      scratch(tiles.scratch_items() + 2 * N * M + (3 + parts + rows) * N * C + (5 + parts) * C, 13 + rows,
              x.accumulation_options()),
      a_at(scratch.take(C)),
      b_at(scratch.take(C)),
      h_at(scratch.take(N * M)),
      grad_hidden_at(scratch.take(N * M)),
      grad_t_at(scratch.take(N * C)),
      grad_z_at(scratch.take(N * C)),
      sums_at(scratch.take(parts * N * C)),
      dropped_at(scratch.take(N * C)),
      totals_at(scratch.take(parts * C)),
      grad_weight_at(scratch.take(C)),
      slope_at(scratch.take(C)),
      offset_at(scratch.take(C)),
      grad_at(grad),
      saved_at(pointer(saved_map)),
      hidden_at(hidden),
      scale_at(scale),
      means_at(sample_means),
      drop_at(pointer(drop)),
      gx_at(pointer(grad_input())),
      gr_at(pointer(grad_residual())) {
  tiles.use(scratch.take(tiles.scratch_items()));
  v.kernels().coefficients(norm, a_at.base, b_at.base);
  e.activate(N, hidden_at, h_at);
  if (!batch_statistics) std::memset(offset_at.base, 0, C * offset_at.item_bytes);
}

void BnBackward::finish_totals() const {
  v.sums().sum_samples(N, parts * C, sums_at.base, totals_at.base);
  v.kernels().backward_coefficients(norm, totals_at.base, grad_weight_at.base, slope_at.base, offset_at.base);
  write_gradient(x, grad_weight_at, to[1]);
  write_gradient(x, totals_at, to[2]);
}

}  // namespace cpu

template <>
void Backend<Cpu>::bn_squeeze_excite(const ops::BnSqueezeExcite& a, const ops::Activations& activations,
                                     const Tensor& y, const ops::SavedBnSqueezeExcite& saved, const Tensor& var) {
  const auto forward =
      activations.pre == Activation::Identity ? cpu::forward_behind_affine : cpu::forward_behind_activation;
  forward(a, activations, y, saved, var);
}

template <>
void Backend<Cpu>::bn_squeeze_excite_backward(const ops::BnSqueezeExciteBackward& a,
                                              const ops::Activations& activations, const Gradients<8>& to) {
  const auto backward =
      activations.pre == Activation::Identity ? cpu::backward_behind_affine : cpu::backward_behind_activation;
  backward(a, activations, to);
}

}  // namespace se_ext
