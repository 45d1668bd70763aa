#include "bn_squeeze_excite.h"

namespace se_ext {
namespace cpu {

BnForward::BnForward(const ops::BnSqueezeExcite& arguments, const ops::Activations& activations, const Tensor& output,
                     const ops::SavedBnSqueezeExcite& kept, const Tensor& var)
    : a(arguments),
      names(activations),
      y(output),
      saved(kept),
      x(a.input),
      e(a.excitation(), names),
      v(a.norm(), x.accumulation_type()),
      residual(x.in_my_layout(a.tail.residual)),
      drop(Vectors::in_type(a.drop_scale, v.type)),
      schedule(Schedule::of(x, residual.defined() ? 3 : 2, e.weight_bytes())) {
  if (!a.batch_statistics) return;
  statistics_of_batch(x, v, a.eps, {saved.statistics.mean, var, saved.statistics.inverse}, saved.sample_means);
}

BnBackward::BnBackward(const ops::BnSqueezeExciteBackward& backward, const ops::Activations& activations,
                       const Gradients<8>& gradients)
    : a(backward.forward),
      names(activations),
      to(gradients),
      x(a.input),
      e(a.excitation(), names),
      v(a.norm(), x.accumulation_type()),
      grad(x.in_my_layout(backward.grad_output)),
      saved_map(x.in_my_layout(a.tail.residual)),
      z(backward.saved.excitation.z.contiguous()),
      hidden(backward.saved.excitation.hidden.contiguous()),
      scale(backward.saved.excitation.scale.contiguous()),
      sample_means(backward.saved.sample_means.contiguous()),
      drop(Vectors::in_type(a.drop_scale, v.type)),
      schedule(Schedule::of(x, saved_map.defined() ? 4 : 3, e.weight_bytes())) {
  if (a.batch_statistics) v.use(backward.saved.statistics);
}

void BnBackward::finish(const Pointer& sums, std::int64_t parts, const Totals& totals) const {
  v.sums().sum_samples(x.samples, parts * x.slab.channels, sums.base, totals.sums.base);
  v.kernels().backward_coefficients(v.of(x), totals.sums.base, totals.grad_weight.base, totals.slope.base,
                                    totals.offset.base);
  write_gradient(x, totals.grad_weight, grad_weight());
  write_gradient(x, totals.sums, grad_bias());
}

}  // namespace cpu

template <>
void Backend<Cpu>::bn_squeeze_excite(const ops::BnSqueezeExcite& a, const ops::Activations& names, const Tensor& y,
                                     const ops::SavedBnSqueezeExcite& saved, const Tensor& var) {
  const cpu::BnForward forward(a, names, y, saved, var);
  if (names.pre == Activation::Identity) {
    forward_behind_affine(forward);
  } else {
    forward_behind_activation(forward);
  }
}

template <>
void Backend<Cpu>::bn_squeeze_excite_backward(const ops::BnSqueezeExciteBackward& a, const ops::Activations& names,
                                              const Gradients<8>& to) {
  const cpu::BnBackward backward(a, names, to);
  if (names.pre == Activation::Identity) {
    backward_behind_affine(backward);
  } else {
    backward_behind_activation(backward);
  }
}

}  // namespace se_ext
