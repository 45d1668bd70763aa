#include "composite.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/library.h>

#include <vector>

#include "allocate.h"
#include "autocast.h"
#include "names.h"

namespace se_ext::composite {
namespace {

constexpr double kLeakySlope = 0.01;

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
  }
  TORCH_INTERNAL_ASSERT(false);
}

// g ⊙ post'(v), from y = post(v).
Tensor through_output(Activation post, const Tensor& g, const Tensor& y) {
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

Tensor scales(const Tensor& z, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2,
              Activation activation, Activation gate) {
  return activate(gate, layer(activate(activation, layer(z, w1, b1)), w2, b2));
}

// scale ⊙ x + residual
Tensor weigh(const Tensor& x, const Tensor& scale, const OptionalTensor& residual) {
  const auto type = accumulation_type(x.scalar_type());
  Tensor s = scale.to(type);
  for (int64_t d = 2; d < x.dim(); ++d) s = s.unsqueeze(-1);
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
Prologue prologue(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, bool batch_statistics,
                  double eps, Activation pre) {
  Prologue r;
  r.u = x.to(accumulation_type(x.scalar_type()));
  if (batch_statistics) {
    std::vector<int64_t> dims{0};
    for (int64_t d = 2; d < x.dim(); ++d) dims.push_back(d);
    r.mean = r.u.mean(dims);
    const Tensor centered = r.u - per_channel(r.mean, x);
    r.var = (centered * centered).mean(dims);
    r.inverse = (r.var + eps).rsqrt();
    r.u = centered * per_channel(r.inverse, x);
  }
  if (weight.has_value()) r.u = r.u * per_channel(*weight, x);
  if (bias.has_value()) r.u = r.u + per_channel(*bias, x);
  r.u = activate(pre, r.u);
  return r;
}

Tensor dropped(const Tensor& scale, const OptionalTensor& drop_scale) {
  return drop_scale.has_value() ? scale * drop_scale->to(scale.scalar_type()).unsqueeze(1) : scale;
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

// d(output)/d(inputs) applied to grad; undefined where not wanted or absent.
std::vector<Tensor> gradients(const Recording& recording, const Tensor& output, const Tensor& grad,
                              const std::vector<OptionalTensor>& inputs, const std::vector<bool>& wanted) {
  torch::autograd::variable_list to;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (wanted[i] && inputs[i].has_value()) to.push_back(*inputs[i]);
  }
  std::vector<Tensor> result(inputs.size());
  if (to.empty()) return result;
  const auto found = torch::autograd::grad({output}, to, {grad.to(output.scalar_type())}, /*retain_graph=*/true,
                                           /*create_graph=*/recording.result);
  size_t next = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (wanted[i] && inputs[i].has_value()) result[i] = found[next++];
  }
  return result;
}

// Backward of y = post(v(residual)), v a function of `inputs` (the map first among them), in the terms of `saved`.
// Returns the gradients of `inputs` and, last, of the residual.
template <class V>
std::vector<Tensor> tail_backward(const Recording& recording, const Tensor& grad, const V& v,
                                  const OptionalTensor& saved, Activation post, std::vector<OptionalTensor> inputs,
                                  std::vector<bool> wanted) {
  const at::ScalarType map_type = inputs[0]->scalar_type();
  if (saved.has_value() && slope_from_output(post)) {
    const auto type = accumulation_type(map_type);
    const Tensor gv = [&] {
      const c10::AutoGradMode as_the_result(recording.result);
      return through_output(post, grad.to(type), saved->to(type));
    }();
    const bool want_residual = wanted.back();
    wanted.pop_back();
    std::vector<Tensor> result = gradients(recording, v(std::nullopt), gv, inputs, wanted);
    result.push_back(want_residual ? gv.to(map_type) : Tensor());
    return result;
  }
  const OptionalTensor residual = stand_in(saved);
  inputs.push_back(residual);
  return gradients(recording, activate(post, v(residual)), grad, inputs, wanted);
}

}  // namespace

Tensor squeeze(const Tensor& input) {
  checks::squeeze(input);
  return spatial_mean(input).to(input.scalar_type());
}

Tensor excite(const Tensor& z, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2,
              std::string_view activation, std::string_view gate) {
  checks::excite(z, {w1, b1, w2, b2, activation, gate});
  return scales(z.to(accumulation_type(z.scalar_type())), w1, b1, w2, b2,
                parse_activation("excite", "activation", activation), parse_gate("excite", gate))
      .to(z.scalar_type());
}

Tensor rescale(const Tensor& input, const Tensor& scale, const OptionalTensor& residual,
               std::string_view post_activation) {
  checks::rescale("rescale", input, scale, residual, post_activation);
  return activate(parse_activation("rescale", "post_activation", post_activation), weigh(input, scale, residual))
      .to(input.scalar_type());
}

Tensor squeeze_excite(const Tensor& input, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                      const OptionalTensor& b2, std::string_view activation, std::string_view gate,
                      const OptionalTensor& residual, std::string_view post_activation) {
  const char* op = "squeeze_excite";
  checks::squeeze_excite(op, input, {w1, b1, w2, b2, activation, gate}, residual, post_activation);
  const Tensor s =
      scales(spatial_mean(input), w1, b1, w2, b2, parse_activation(op, "activation", activation), parse_gate(op, gate));
  return activate(parse_activation(op, "post_activation", post_activation), weigh(input, s, residual))
      .to(input.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> excite_backward(const Tensor& grad_output, const Tensor& z_,
                                                                   const Tensor& w1_, const OptionalTensor& b1_,
                                                                   const Tensor& w2_, const OptionalTensor& b2_,
                                                                   std::string_view activation, std::string_view gate,
                                                                   std::array<bool, 5> mask) {
  const Recording recording;
  const Tensor z = stand_in(z_), w1 = stand_in(w1_), w2 = stand_in(w2_);
  const OptionalTensor b1 = stand_in(b1_), b2 = stand_in(b2_);
  const auto g = gradients(recording, excite(z, w1, b1, w2, b2, activation, gate), grad_output, {z, w1, b1, w2, b2},
                           std::vector<bool>(mask.begin(), mask.end()));
  return {g[0], g[1], g[2], g[3], g[4]};
}

std::tuple<Tensor, Tensor, Tensor> rescale_backward(const Tensor& grad_output, const Tensor& input, const Tensor& scale,
                                                    const OptionalTensor& saved, std::string_view post_activation,
                                                    std::array<bool, 3> mask) {
  const Recording recording;
  const Tensor x = stand_in(input), s = stand_in(scale);
  const auto g = tail_backward(
      recording, grad_output, [&](const OptionalTensor& r) { return weigh(x, s, r); }, saved,
      parse_activation("rescale", "post_activation", post_activation), {x, s},
      std::vector<bool>(mask.begin(), mask.end()));
  return {g[0], g[1], g[2]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> squeeze_excite_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& w1_, const OptionalTensor& b1_, const Tensor& w2_,
    const OptionalTensor& b2_, const OptionalTensor& saved, std::string_view activation, std::string_view gate,
    std::string_view post_activation, std::array<bool, 6> mask) {
  const char* op = "squeeze_excite";
  const Recording recording;
  const Tensor x = stand_in(input), w1 = stand_in(w1_), w2 = stand_in(w2_);
  const OptionalTensor b1 = stand_in(b1_), b2 = stand_in(b2_);
  const auto v = [&](const OptionalTensor& residual) {
    return weigh(
        x,
        scales(spatial_mean(x), w1, b1, w2, b2, parse_activation(op, "activation", activation), parse_gate(op, gate)),
        residual);
  };
  const auto g =
      tail_backward(recording, grad_output, v, saved, parse_activation(op, "post_activation", post_activation),
                    {x, w1, b1, w2, b2}, std::vector<bool>(mask.begin(), mask.end()));
  return {g[0], g[1], g[2], g[3], g[4], g[5]};
}

std::tuple<Tensor, Tensor, Tensor> bn_squeeze_excite(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& w1,
    const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2, bool batch_statistics, double eps,
    std::string_view pre_activation, std::string_view activation, std::string_view gate, const OptionalTensor& residual,
    std::string_view post_activation, const OptionalTensor& drop_scale) {
  const char* op = "bn_squeeze_excite";
  checks::bn_squeeze_excite(op, input, {weight, bias, batch_statistics, pre_activation},
                            {w1, b1, w2, b2, activation, gate}, residual, post_activation, drop_scale);
  const Prologue p =
      prologue(input, weight, bias, batch_statistics, eps, parse_activation(op, "pre_activation", pre_activation));
  const Tensor s =
      scales(spatial_mean(p.u), w1, b1, w2, b2, parse_activation(op, "activation", activation), parse_gate(op, gate));
  const Tensor y =
      activate(parse_activation(op, "post_activation", post_activation), weigh(p.u, dropped(s, drop_scale), residual))
          .to(input.scalar_type());
  if (batch_statistics) return {y, p.mean.detach(), p.var.detach()};
  const auto none = [&] { return at::empty({0}, p.u.options()); };
  return {y, none(), none()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_squeeze_excite_backward(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight_, const OptionalTensor& bias_,
    const Tensor& w1_, const OptionalTensor& b1_, const Tensor& w2_, const OptionalTensor& b2_,
    const OptionalTensor& saved, const OptionalTensor& drop_scale, bool batch_statistics, double eps,
    std::string_view pre_activation, std::string_view activation, std::string_view gate,
    std::string_view post_activation, std::array<bool, 8> mask) {
  const char* op = "bn_squeeze_excite";
  const Recording recording;
  const Tensor x = stand_in(input), w1 = stand_in(w1_), w2 = stand_in(w2_);
  const OptionalTensor weight = stand_in(weight_), bias = stand_in(bias_), b1 = stand_in(b1_), b2 = stand_in(b2_);
  const auto v = [&](const OptionalTensor& residual) {
    const Tensor u =
        prologue(x, weight, bias, batch_statistics, eps, parse_activation(op, "pre_activation", pre_activation)).u;
    const Tensor s =
        scales(spatial_mean(u), w1, b1, w2, b2, parse_activation(op, "activation", activation), parse_gate(op, gate));
    return weigh(u, dropped(s, drop_scale), residual);
  };
  const auto g =
      tail_backward(recording, grad_output, v, saved, parse_activation(op, "post_activation", post_activation),
                    {x, weight, bias, w1, b1, w2, b2}, std::vector<bool>(mask.begin(), mask.end()));
  return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_activation(const Tensor& input, const OptionalTensor& weight,
                                                         const OptionalTensor& bias, bool batch_statistics, double eps,
                                                         std::string_view activation) {
  const char* op = "bn_activation";
  checks::bn_activation(op, input, weight, bias, batch_statistics, activation);
  const Prologue p =
      prologue(input, weight, bias, batch_statistics, eps, parse_activation(op, "activation", activation));
  const Tensor y = p.u.to(input.scalar_type());
  if (batch_statistics) return {y, p.mean.detach(), p.var.detach(), p.inverse.detach()};
  const auto none = [&] { return at::empty({0}, p.u.options()); };
  return {y, none(), none(), none()};
}

std::tuple<Tensor, Tensor, Tensor> bn_activation_backward(const Tensor& grad_output, const Tensor& input,
                                                          const OptionalTensor& weight_, const OptionalTensor& bias_,
                                                          bool batch_statistics, double eps,
                                                          std::string_view activation, std::array<bool, 3> mask) {
  const Recording recording;
  const Tensor x = stand_in(input);
  const OptionalTensor weight = stand_in(weight_), bias = stand_in(bias_);
  const Tensor u =
      prologue(x, weight, bias, batch_statistics, eps, parse_activation("bn_activation", "activation", activation)).u;
  const auto g = gradients(recording, u, grad_output, {x, weight, bias}, std::vector<bool>(mask.begin(), mask.end()));
  return {g[0], g[1], g[2]};
}

namespace {

void rescale_(Tensor& input, const Tensor& scale, const OptionalTensor& residual, std::string_view post_activation) {
  checks::rescale_in_place(input, scale, residual, post_activation);
  input.copy_(rescale(input, scale, residual, post_activation));
}

void squeeze_excite_(Tensor& input, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                     const OptionalTensor& b2, std::string_view activation, std::string_view gate,
                     const OptionalTensor& residual, std::string_view post_activation) {
  checks::squeeze_excite_in_place(input, {w1, b1, w2, b2, activation, gate}, residual, post_activation);
  input.copy_(squeeze_excite(input, w1, b1, w2, b2, activation, gate, residual, post_activation));
}

// Devices without kernels of ours.
TORCH_LIBRARY_IMPL(se_ext, CompositeExplicitAutograd, m) {
  m.impl("squeeze", squeeze);
  m.impl("excite", excite);
  m.impl("rescale", rescale);
  m.impl("squeeze_excite", squeeze_excite);
  m.impl("bn_squeeze_excite", bn_squeeze_excite);
  m.impl("_bn_activation", bn_activation);
  m.impl("rescale_", rescale_);
  m.impl("squeeze_excite_", squeeze_excite_);
}

// torch.func: under vmap, grad, jvp, … the formula's own operators are transformed, one by one. These kernels come
// before autocast's, so they cast themselves.
TORCH_LIBRARY_IMPL(se_ext, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("squeeze", [](const Tensor& input) {
    const Autocast cast(input);
    return composite::squeeze(cast.map(input));
  });
  m.impl("excite", [](const Tensor& z, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                      const OptionalTensor& b2, std::string_view activation, std::string_view gate) {
    const Autocast cast(z);
    return composite::excite(cast.map(z), cast.weight(w1), cast.weight(b1), cast.weight(w2), cast.weight(b2),
                             activation, gate);
  });
  m.impl("rescale", [](const Tensor& input, const Tensor& scale, const OptionalTensor& residual,
                       std::string_view post_activation) {
    const Autocast cast(input);
    return composite::rescale(cast.map(input), cast.weight(scale), cast.map(residual), post_activation);
  });
  m.impl("squeeze_excite", [](const Tensor& input, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                              const OptionalTensor& b2, std::string_view activation, std::string_view gate,
                              const OptionalTensor& residual, std::string_view post_activation) {
    const Autocast cast(input);
    return composite::squeeze_excite(cast.map(input), cast.weight(w1), cast.weight(b1), cast.weight(w2),
                                     cast.weight(b2), activation, gate, cast.map(residual), post_activation);
  });
  m.impl("bn_squeeze_excite",
         [](const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& w1,
            const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2, bool batch_statistics, double eps,
            std::string_view pre_activation, std::string_view activation, std::string_view gate,
            const OptionalTensor& residual, std::string_view post_activation, const OptionalTensor& drop_scale) {
           const Autocast cast(input);
           return composite::bn_squeeze_excite(cast.map(input), cast.weight(weight), cast.weight(bias), cast.weight(w1),
                                               cast.weight(b1), cast.weight(w2), cast.weight(b2), batch_statistics, eps,
                                               pre_activation, activation, gate, cast.map(residual), post_activation,
                                               cast.weight(drop_scale));
         });
  m.impl("_bn_activation", [](const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                              bool batch_statistics, double eps, std::string_view activation) {
    const Autocast cast(input);
    return composite::bn_activation(cast.map(input), cast.weight(weight), cast.weight(bias), batch_statistics, eps,
                                    activation);
  });
  m.impl("rescale_", rescale_);
  m.impl("squeeze_excite_", squeeze_excite_);
}

}  // namespace

}  // namespace se_ext::composite
