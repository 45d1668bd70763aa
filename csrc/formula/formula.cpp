#include "formula.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/csrc/autograd/autograd.h>

#include <vector>

#include "../ops/allocate.h"

namespace se_ext::formula {
namespace {

Tensor activate(Activation a, const Tensor& v) {
  switch (a) {
    case Activation::Identity:
      return v;
    case Activation::Relu:
      return at::relu(v);
    case Activation::Relu6:
      return at::hardtanh(v, 0, 6);
    case Activation::Silu:
      return at::silu(v);
    case Activation::Gelu:
      return at::gelu(v);
    case Activation::Hardswish:
      return at::hardswish(v);
    case Activation::LeakyRelu:
      return at::leaky_relu(v, kLeakySlope);
    case Activation::Tanh:
      return at::tanh(v);
    case Activation::Sigmoid:
      return at::sigmoid(v);
    case Activation::Hardsigmoid:
      return at::hardtanh(v + 3, 0, 6) / 6;  // at::hardsigmoid's gradient uses a float32 1/6 even in float64
    case Activation::DoubleSigmoid:
      return 2 * at::sigmoid(v);
  }
  TORCH_INTERNAL_ASSERT(false);
}

// g ⊙ post'(v), from y = post(v).
Tensor gradient_from_output(Activation post, const Tensor& g, const Tensor& y) {
  const Tensor zero = at::zeros({}, g.options());
  switch (post) {
    case Activation::Identity:
      return g;
    case Activation::Relu:
      return at::where(y <= 0, zero, g);
    case Activation::Relu6:
      return at::where((y <= 0).logical_or(y >= 6), zero, g);
    case Activation::LeakyRelu:
      return at::where(y > 0, g, g * kLeakySlope);
    case Activation::Tanh:
      return g * (1 - y * y);
    case Activation::Sigmoid:
      return g * y * (1 - y);
    default:
      TORCH_INTERNAL_ASSERT(false);
  }
}

// ---- the formula in the accumulation type ----

Tensor spatial_mean(const Tensor& x) {
  std::vector<int64_t> spatial;
  for (int64_t d = 2; d < x.dim(); ++d) spatial.push_back(d);
  return at::mean(x, spatial, /*keepdim=*/false, accumulation_type(x.scalar_type()));
}

Tensor layer(const Tensor& in, const Tensor& w, const OptionalTensor& b) {
  const auto type = in.scalar_type();
  return at::linear(in, w.to(type).flatten(1), b.has_value() ? OptionalTensor(b->to(type)) : OptionalTensor());
}

Tensor scale_of(const Tensor& z, const ops::Excitation& e, const ops::Activations& activations) {
  return activate(activations.gate, layer(activate(activations.activation, layer(z, e.w1, e.b1)), e.w2, e.b2));
}

// scale ⊙ x + residual, scale [N] or [N, C]
Tensor weigh(const Tensor& x, const Tensor& scale, const OptionalTensor& residual) {
  const auto type = accumulation_type(x.scalar_type());
  Tensor s = scale.to(type);
  while (s.dim() < x.dim()) s = s.unsqueeze(-1);
  const Tensor v = s * x.to(type);
  return residual.has_value() ? v + residual->to(type) : v;
}

Tensor per_channel(const Tensor& v, const Tensor& x) {
  std::vector<int64_t> shape(x.dim(), 1);
  shape[1] = -1;
  return v.to(accumulation_type(x.scalar_type())).view(shape);
}

// u = pre(weight ⊙ norm(x) + bias), and the batch's mean, biased variance and 1 / sqrt(var + eps), undefined where
// nothing is normalised.
struct Prologue {
  Tensor u, mean, var, inverse;
};
Prologue prologue(const Tensor& x, const ops::BatchNorm& norm, Activation pre) {
  Prologue r;
  r.u = x.to(accumulation_type(x.scalar_type()));
  if (norm.batch_statistics) {
    std::vector<int64_t> dims{0};
    for (int64_t d = 2; d < x.dim(); ++d) dims.push_back(d);
    r.mean = r.u.mean(dims);
    const Tensor centered = r.u - per_channel(r.mean, x);
    r.var = (centered * centered).mean(dims);
    r.inverse = (r.var + norm.eps).rsqrt();
    r.u = centered * per_channel(r.inverse, x);
  }
  if (norm.weight.has_value()) r.u = r.u * per_channel(*norm.weight, x);
  if (norm.bias.has_value()) r.u = r.u + per_channel(*norm.bias, x);
  r.u = activate(pre, r.u);
  return r;
}

Tensor dropped(const Tensor& scale, const OptionalTensor& drop_scale) {
  return drop_scale.has_value() ? scale * drop_scale->to(scale.scalar_type()).unsqueeze(1) : scale;
}

// v = scale ⊙ u (+ residual), before post.
Tensor weighed(const ops::SqueezeExcite& a, const ops::Activations& activations, const OptionalTensor& residual) {
  return weigh(a.input, scale_of(spatial_mean(a.input), a.excitation, activations), residual);
}
Tensor weighed(const ops::BnSqueezeExcite& a, const ops::Activations& activations, const Tensor& u,
               const OptionalTensor& residual) {
  return weigh(u, dropped(scale_of(spatial_mean(u), a.excitation(), activations), a.drop_scale), residual);
}
Tensor weighed(const ops::BnActivation& a, const Tensor& u, const OptionalTensor& residual) {
  if (a.drop_scale.has_value()) return weigh(u, *a.drop_scale, residual);
  return residual.has_value() ? u + residual->to(u.scalar_type()) : u;
}

// ---- differentiable backward ----

// Stands for `t` in a formula that is differentiated anew: a view of it, so that a derivative with respect to it is not
// mixed with that of another argument computed from the same tensor.
Tensor stand_in(const Tensor& t) {
  return t.requires_grad() ? t.view_as(t) : t.detach().requires_grad_();
}
OptionalTensor stand_in(const OptionalTensor& t) {
  return t.has_value() ? OptionalTensor(stand_in(*t)) : t;
}

// Recording is needed to differentiate the formula anew, whether or not the result is recorded in turn.
struct Recording {
  bool result = c10::GradMode::is_enabled();
  c10::AutoGradMode on{true};
};

// d(output)/d(inputs) applied to grad; undefined where not wanted or absent. There may be more wants than inputs.
template <std::size_t n>
std::array<Tensor, n> gradients(const Recording& recording, const Tensor& output, const Tensor& grad,
                                const std::vector<OptionalTensor>& inputs, const std::array<bool, n>& wanted) {
  torch::autograd::variable_list to;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (wanted[i] && inputs[i].has_value()) to.push_back(*inputs[i]);
  }
  std::array<Tensor, n> result;
  if (to.empty()) return result;
  const auto computed = torch::autograd::grad({output}, to, {grad.to(output.scalar_type())}, /*retain_graph=*/true,
                                              /*create_graph=*/recording.result);
  std::size_t next = 0;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (wanted[i] && inputs[i].has_value()) result[i] = computed[next++];
  }
  return result;
}

// Backward of y = post(v(residual)), v a function of `inputs` (the map first among them), in the terms of what forward
// saved in the residual's place. The gradients of `inputs` and, last, of the residual.
template <class V, std::size_t n>
std::array<Tensor, n> tail_backward(const Recording& recording, const Tensor& grad, const V& v,
                                    const OptionalTensor& saved, Activation post, std::vector<OptionalTensor> inputs,
                                    const std::array<bool, n>& wanted) {
  const at::ScalarType map_type = inputs[0]->scalar_type();
  if (saved.has_value() && slope_from_output(post)) {
    const auto type = accumulation_type(map_type);
    const Tensor gv = [&] {
      const c10::AutoGradMode as_the_result(recording.result);
      return gradient_from_output(post, grad.to(type), saved->to(type));
    }();
    auto result = gradients(recording, v(std::nullopt), gv, inputs, wanted);
    if (wanted.back()) result.back() = gv.to(map_type);
    return result;
  }
  const OptionalTensor residual = stand_in(saved);
  inputs.push_back(residual);
  return gradients(recording, activate(post, v(residual)), grad, inputs, wanted);
}

}  // namespace

Tensor compute(const ops::Squeeze& a) {
  a.check();
  return spatial_mean(a.input).to(a.input.scalar_type());
}

Tensor compute(const ops::Excite& a) {
  const ops::Activations activations = a.check();
  const Tensor z = a.input.to(accumulation_type(a.input.scalar_type()));
  return scale_of(z, a.excitation, activations).to(a.input.scalar_type());
}

Tensor compute(const ops::Rescale& a) {
  const ops::Activations activations = a.check();
  return activate(activations.post, weigh(a.input, a.scale, a.tail.residual)).to(a.input.scalar_type());
}

Tensor compute(const ops::SqueezeExcite& a) {
  const ops::Activations activations = a.check();
  return activate(activations.post, weighed(a, activations, a.tail.residual)).to(a.input.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> compute(const ops::BnSqueezeExcite& a) {
  const ops::Activations activations = a.check();
  const Prologue p = prologue(a.input, a.norm(), activations.pre);
  const Tensor y = activate(activations.post, weighed(a, activations, p.u, a.tail.residual)).to(a.input.scalar_type());
  if (a.batch_statistics) return {y, p.mean.detach(), p.var.detach()};
  const auto none = [&] { return at::empty({0}, p.u.options()); };
  return {y, none(), none()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> compute(const ops::BnActivation& a) {
  const ops::Activations activations = a.check();
  const Prologue p = prologue(a.input, a.norm(), Activation::Identity);
  const Tensor y = activate(activations.post, weighed(a, p.u, a.residual)).to(a.input.scalar_type());
  if (a.batch_statistics) return {y, p.mean.detach(), p.var.detach(), p.inverse.detach()};
  const auto none = [&] { return at::empty({0}, p.u.options()); };
  return {y, none(), none(), none()};
}

std::array<Tensor, 5> compute(const ops::ExciteBackward& a) {
  a.check();
  const Recording recording;
  const ops::Excitation& e = a.forward.excitation;
  const Tensor z = stand_in(a.forward.input), w1 = stand_in(e.w1), w2 = stand_in(e.w2);
  const OptionalTensor b1 = stand_in(e.b1), b2 = stand_in(e.b2);
  const Tensor scale = compute(ops::Excite{z, {w1, b1, w2, b2, e.activation, e.gate}});
  return gradients(recording, scale, a.grad_output, {z, w1, b1, w2, b2}, a.mask);
}

std::array<Tensor, 3> compute(const ops::RescaleBackward& a) {
  const ops::Activations activations = a.check();
  const Recording recording;
  const Tensor x = stand_in(a.forward.input), s = stand_in(a.forward.scale);
  const auto v = [&](const OptionalTensor& residual) { return weigh(x, s, residual); };
  return tail_backward(recording, a.grad_output, v, a.forward.tail.residual, activations.post, {x, s}, a.mask);
}

std::array<Tensor, 6> compute(const ops::SqueezeExciteBackward& a) {
  const ops::Activations activations = a.check();
  const Recording recording;
  const ops::Excitation& e = a.forward.excitation;
  const Tensor x = stand_in(a.forward.input), w1 = stand_in(e.w1), w2 = stand_in(e.w2);
  const OptionalTensor b1 = stand_in(e.b1), b2 = stand_in(e.b2);
  const ops::SqueezeExcite forward{x, {w1, b1, w2, b2, e.activation, e.gate}, a.forward.tail};
  const auto v = [&](const OptionalTensor& residual) { return weighed(forward, activations, residual); };
  return tail_backward(recording, a.grad_output, v, a.forward.tail.residual, activations.post, {x, w1, b1, w2, b2},
                       a.mask);
}

std::array<Tensor, 8> compute(const ops::BnSqueezeExciteBackward& a) {
  const ops::Activations activations = a.check();
  const Recording recording;
  const ops::BnSqueezeExcite& f = a.forward;
  const Tensor x = stand_in(f.input), w1 = stand_in(f.w1), w2 = stand_in(f.w2);
  const OptionalTensor weight = stand_in(f.bn_weight), bias = stand_in(f.bn_bias);
  const OptionalTensor b1 = stand_in(f.b1), b2 = stand_in(f.b2);
  const ops::BnSqueezeExcite forward{
      x,     weight,           bias,         w1,     b1,     w2,          b2, f.batch_statistics,
      f.eps, f.pre_activation, f.activation, f.gate, f.tail, f.drop_scale};
  const auto v = [&](const OptionalTensor& residual) {
    return weighed(forward, activations, prologue(x, forward.norm(), activations.pre).u, residual);
  };
  return tail_backward(recording, a.grad_output, v, f.tail.residual, activations.post,
                       {x, weight, bias, w1, b1, w2, b2}, a.mask);
}

std::array<Tensor, 4> compute(const ops::BnActivationBackward& a) {
  const ops::Activations activations = a.check();
  const Recording recording;
  const ops::BnActivation& f = a.forward;
  const Tensor x = stand_in(f.input);
  const OptionalTensor weight = stand_in(f.weight), bias = stand_in(f.bias);
  const auto v = [&](const OptionalTensor& residual) {
    return weighed(f, prologue(x, {weight, bias, f.batch_statistics, f.eps}, Activation::Identity).u, residual);
  };
  return tail_backward(recording, a.grad_output, v, f.residual, activations.post, {x, weight, bias}, a.mask);
}

}  // namespace se_ext::formula
