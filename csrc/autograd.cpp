// Autograd for the public ops, in C++. Saved for backward: the inputs, the small z, hidden and scale, and of full size
// only what the post-activation's slope needs (see RescaleBackward in params.h).
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/stack.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "allocate.h"
#include "composite.h"
#include "names.h"
#include "ops.h"

namespace se_ext {
namespace {

using at::Tensor;
using checks::OptionalTensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool requires_grad(const Tensor& t) {
  return t.requires_grad();
}
bool requires_grad(const OptionalTensor& t) {
  return t.has_value() && t->requires_grad();
}

bool has_tangent(const Tensor& t) {
  return t._fw_grad(/*level=*/0).defined();
}
bool has_tangent(const OptionalTensor& t) {
  return t.has_value() && has_tangent(*t);
}

template <class... T>
bool has_tangents(const T&... tensors) {
  return (has_tangent(tensors) || ...);
}

template <class... T>
bool is_recorded(const T&... tensors) {
  return c10::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}

bool has_kernels(const Tensor& input) {
  switch (input.device().type()) {
    case c10::DeviceType::CPU:
    case c10::DeviceType::Meta:
      return true;
    case c10::DeviceType::CUDA:
      return ops::squeeze().hasKernelForDispatchKey(c10::DispatchKey::CUDA);
    default:
      return false;
  }
}

// Forward-mode AD, and devices without kernels, go through the plain formula.
template <class... T>
bool needs_formula(const Tensor& input, const T&... others) {
  return has_tangents(input, others...) || !has_kernels(input);
}

OptionalTensor optional(const Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}
Tensor or_undefined(const OptionalTensor& t) {
  return t.value_or(Tensor());
}

// Which of the forward's tensor arguments want a gradient; absent ones don't, and autograd doesn't count them.
template <std::size_t n>
std::array<bool, n> wanted(AutogradContext* ctx, const std::array<bool, n>& present) {
  std::array<bool, n> mask{};
  std::size_t edge = 0;
  for (std::size_t i = 0; i < n; ++i) mask[i] = present[i] && ctx->needs_input_grad(edge++);
  return mask;
}

// What backward of `post` needs besides x and scale.
Tensor saved_for(Activation post, const Tensor& output, const OptionalTensor& residual) {
  if (!residual.has_value() || post == Activation::Identity) return Tensor();
  return slope_from_output(post) ? output : *residual;
}

struct Squeeze : torch::autograd::Function<Squeeze> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["sizes"] = input.sym_sizes();
    return ops::squeeze().call(input);
  }

  // grad / P, spread over the points as an expanded view: nothing of the map's size is written.
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto sizes = ctx->saved_data["sizes"].toSymIntVector();
    c10::SymInt points = 1;
    Tensor g = grads[0];
    for (std::size_t d = 2; d < sizes.size(); ++d) {
      points *= sizes[d];
      g = g.unsqueeze(-1);
    }
    return {(g / at::Scalar(points)).expand_symint(sizes)};
  }
};

struct Excite : torch::autograd::Function<Excite> {
  static Tensor forward(AutogradContext* ctx, const Tensor& z, const Tensor& w1, const OptionalTensor& b1,
                        const Tensor& w2, const OptionalTensor& b2, std::string_view activation,
                        std::string_view gate) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [output, hidden] = ops::_excite_forward().call(z, w1, b1, w2, b2, activation, gate);
    ctx->save_for_backward({z, w1, or_undefined(b1), w2, or_undefined(b2), hidden, output});
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["gate"] = std::string(gate);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto s = ctx->get_saved_variables();
    const auto mask = wanted<5>(ctx, {true, true, s[2].defined(), true, s[4].defined()});
    auto [gz, gw1, gb1, gw2, gb2] = ops::_excite_backward().call(
        grads[0], s[0], s[1], optional(s[2]), s[3], optional(s[4]), s[5], s[6],
        ctx->saved_data["activation"].toStringView(), ctx->saved_data["gate"].toStringView(), mask);
    return {gz, gw1, gb1, gw2, gb2, Tensor(), Tensor()};
  }
};

struct Rescale : torch::autograd::Function<Rescale> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& scale, const OptionalTensor& residual,
                        std::string_view post_activation) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor output = ops::rescale().call(input, scale, residual, post_activation);
    const Activation post = parse_activation("rescale", "post_activation", post_activation);
    ctx->save_for_backward({input, scale, saved_for(post, output, residual)});
    ctx->saved_data["residual"] = residual.has_value();
    ctx->saved_data["post_activation"] = std::string(post_activation);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto s = ctx->get_saved_variables();
    const auto post = ctx->saved_data["post_activation"].toStringView();
    auto mask = wanted<3>(ctx, {true, true, ctx->saved_data["residual"].toBool()});
    const bool residual_gets_grad = mask[2] && post == "identity";
    if (residual_gets_grad) mask[2] = false;
    auto [gx, gs, gr] = ops::_rescale_backward().call(grads[0], s[0], s[1], optional(s[2]), post, mask);
    return {gx, gs, residual_gets_grad ? grads[0] : gr, Tensor()};
  }
};

struct SqueezeExcite : torch::autograd::Function<SqueezeExcite> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& w1, const OptionalTensor& b1,
                        const Tensor& w2, const OptionalTensor& b2, std::string_view activation, std::string_view gate,
                        const OptionalTensor& residual, std::string_view post_activation) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [output, z, hidden, scale] =
        ops::_squeeze_excite_forward().call(input, w1, b1, w2, b2, activation, gate, residual, post_activation);
    const Activation post = parse_activation("squeeze_excite", "post_activation", post_activation);
    ctx->save_for_backward(
        {input, w1, or_undefined(b1), w2, or_undefined(b2), z, hidden, scale, saved_for(post, output, residual)});
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["gate"] = std::string(gate);
    ctx->saved_data["residual"] = residual.has_value();
    ctx->saved_data["post_activation"] = std::string(post_activation);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto s = ctx->get_saved_variables();
    const auto post = ctx->saved_data["post_activation"].toStringView();
    auto mask =
        wanted<6>(ctx, {true, true, s[2].defined(), true, s[4].defined(), ctx->saved_data["residual"].toBool()});
    const bool residual_gets_grad = mask[5] && post == "identity";
    if (residual_gets_grad) mask[5] = false;
    auto [gx, gw1, gb1, gw2, gb2, gr] = ops::_squeeze_excite_backward().call(
        grads[0], s[0], s[1], optional(s[2]), s[3], optional(s[4]), s[5], s[6], s[7], optional(s[8]),
        ctx->saved_data["activation"].toStringView(), ctx->saved_data["gate"].toStringView(), post, mask);
    return {gx, gw1, gb1, gw2, gb2, Tensor(), Tensor(), residual_gets_grad ? grads[0] : gr, Tensor()};
  }
};

// What an op gives beside its differentiable output. Autograd's wrapping of an output costs more than a small vector's
// computation, so these don't pass through it.
struct Statistics {
  Tensor mean, var, inverse;
};

struct BnSqueezeExcite : torch::autograd::Function<BnSqueezeExcite> {
  static Tensor forward(AutogradContext* ctx, Statistics& found, const Tensor& input, const OptionalTensor& weight,
                        const OptionalTensor& bias, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                        const OptionalTensor& b2, bool batch_statistics, double eps, std::string_view pre_activation,
                        std::string_view activation, std::string_view gate, const OptionalTensor& residual,
                        std::string_view post_activation, const OptionalTensor& drop_scale) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [output, mean, var, inverse, sample_means, z, hidden, scale] =
        ops::_bn_squeeze_excite_forward().call(input, weight, bias, w1, b1, w2, b2, batch_statistics, eps,
                                               pre_activation, activation, gate, residual, post_activation, drop_scale);
    const Activation post = parse_activation("bn_squeeze_excite", "post_activation", post_activation);
    ctx->save_for_backward({input, or_undefined(weight), or_undefined(bias), w1, or_undefined(b1), w2, or_undefined(b2),
                            mean, inverse, sample_means, z, hidden, scale, saved_for(post, output, residual),
                            or_undefined(drop_scale)});
    found = {mean, var, inverse};
    ctx->saved_data["batch_statistics"] = batch_statistics;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["pre_activation"] = std::string(pre_activation);
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["gate"] = std::string(gate);
    ctx->saved_data["residual"] = residual.has_value();
    ctx->saved_data["post_activation"] = std::string(post_activation);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto s = ctx->get_saved_variables();
    const auto name = [&](const char* key) { return ctx->saved_data[key].toStringView(); };
    const auto post = name("post_activation");
    auto mask = wanted<8>(ctx, {true, s[1].defined(), s[2].defined(), true, s[4].defined(), true, s[6].defined(),
                                ctx->saved_data["residual"].toBool()});
    const bool residual_gets_grad = mask[7] && post == "identity";
    if (residual_gets_grad) mask[7] = false;
    auto [gx, gw, gb, gw1, gb1, gw2, gb2, gr] = ops::_bn_squeeze_excite_backward().call(
        grads[0], s[0], optional(s[1]), optional(s[2]), s[3], optional(s[4]), s[5], optional(s[6]), s[7], s[8], s[9],
        s[10], s[11], s[12], optional(s[13]), optional(s[14]), ctx->saved_data["batch_statistics"].toBool(),
        ctx->saved_data["eps"].toDouble(), name("pre_activation"), name("activation"), name("gate"), post, mask);
    return {Tensor(), gx,       gw,       gb,       gw1,      gb1,      gw2,
            gb2,      Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), residual_gets_grad ? grads[0] : gr,
            Tensor(), Tensor()};
  }
};

struct BnActivation : torch::autograd::Function<BnActivation> {
  static Tensor forward(AutogradContext* ctx, Statistics& found, const Tensor& input, const OptionalTensor& weight,
                        const OptionalTensor& bias, bool batch_statistics, double eps, std::string_view activation) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [output, mean, var, inverse] =
        ops::_bn_activation().call(input, weight, bias, batch_statistics, eps, activation);
    ctx->save_for_backward({input, or_undefined(weight), or_undefined(bias), mean, inverse});
    found = {mean, var, inverse};
    ctx->saved_data["batch_statistics"] = batch_statistics;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["activation"] = std::string(activation);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto s = ctx->get_saved_variables();
    const auto mask = wanted<3>(ctx, {true, s[1].defined(), s[2].defined()});
    auto [gx, gw, gb] = ops::_bn_activation_backward().call(
        grads[0], s[0], optional(s[1]), optional(s[2]), s[3], s[4], ctx->saved_data["batch_statistics"].toBool(),
        ctx->saved_data["eps"].toDouble(), ctx->saved_data["activation"].toStringView(), mask);
    return {Tensor(), gx, gw, gb, Tensor(), Tensor(), Tensor()};
  }
};

// ---- the kernels at the Autograd key: formula, recorded, or straight through ----

Tensor squeeze(const Tensor& input) {
  checks::placement("squeeze", {{"input", input}});
  if (needs_formula(input)) return composite::squeeze(input);
  if (is_recorded(input)) return Squeeze::apply(input);
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::squeeze().call(input);
}

Tensor excite(const Tensor& z, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2,
              std::string_view activation, std::string_view gate) {
  checks::placement("excite", {{"z", z}, {"w1", w1}, {"b1", b1}, {"w2", w2}, {"b2", b2}});
  if (needs_formula(z, w1, b1, w2, b2)) return composite::excite(z, w1, b1, w2, b2, activation, gate);
  if (is_recorded(z, w1, b1, w2, b2)) return Excite::apply(z, w1, b1, w2, b2, activation, gate);
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::excite().call(z, w1, b1, w2, b2, activation, gate);
}

Tensor rescale(const Tensor& input, const Tensor& scale, const OptionalTensor& residual,
               std::string_view post_activation) {
  checks::placement("rescale", {{"input", input}, {"scale", scale}, {"residual", residual}});
  if (needs_formula(input, scale, residual)) return composite::rescale(input, scale, residual, post_activation);
  if (is_recorded(input, scale, residual)) return Rescale::apply(input, scale, residual, post_activation);
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::rescale().call(input, scale, residual, post_activation);
}

Tensor squeeze_excite(const Tensor& input, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                      const OptionalTensor& b2, std::string_view activation, std::string_view gate,
                      const OptionalTensor& residual, std::string_view post_activation) {
  checks::placement("squeeze_excite",
                    {{"input", input}, {"w1", w1}, {"b1", b1}, {"w2", w2}, {"b2", b2}, {"residual", residual}});
  if (needs_formula(input, w1, b1, w2, b2, residual)) {
    return composite::squeeze_excite(input, w1, b1, w2, b2, activation, gate, residual, post_activation);
  }
  if (is_recorded(input, w1, b1, w2, b2, residual)) {
    return SqueezeExcite::apply(input, w1, b1, w2, b2, activation, gate, residual, post_activation);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::squeeze_excite().call(input, w1, b1, w2, b2, activation, gate, residual, post_activation);
}

std::tuple<Tensor, Tensor, Tensor> bn_squeeze_excite(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& w1,
    const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2, bool batch_statistics, double eps,
    std::string_view pre_activation, std::string_view activation, std::string_view gate, const OptionalTensor& residual,
    std::string_view post_activation, const OptionalTensor& drop_scale) {
  checks::placement("bn_squeeze_excite", {{"input", input},
                                          {"bn_weight", weight},
                                          {"bn_bias", bias},
                                          {"w1", w1},
                                          {"b1", b1},
                                          {"w2", w2},
                                          {"b2", b2},
                                          {"residual", residual},
                                          {"drop_scale", drop_scale}});
  TORCH_CHECK(!is_recorded(drop_scale),
              "bn_squeeze_excite: expected drop_scale that does not require grad (it is drawn at random, and gets no "
              "gradient), got one that does");
  if (needs_formula(input, weight, bias, w1, b1, w2, b2, residual, drop_scale)) {
    return composite::bn_squeeze_excite(input, weight, bias, w1, b1, w2, b2, batch_statistics, eps, pre_activation,
                                        activation, gate, residual, post_activation, drop_scale);
  }
  if (is_recorded(input, weight, bias, w1, b1, w2, b2, residual)) {
    Statistics found;
    const Tensor output =
        BnSqueezeExcite::apply(found, input, weight, bias, w1, b1, w2, b2, batch_statistics, eps, pre_activation,
                               activation, gate, residual, post_activation, drop_scale);
    return {output, found.mean, found.var};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::bn_squeeze_excite().call(input, weight, bias, w1, b1, w2, b2, batch_statistics, eps, pre_activation,
                                       activation, gate, residual, post_activation, drop_scale);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_activation(const Tensor& input, const OptionalTensor& weight,
                                                         const OptionalTensor& bias, bool batch_statistics, double eps,
                                                         std::string_view activation) {
  checks::placement("bn_activation", {{"input", input}, {"weight", weight}, {"bias", bias}});
  if (needs_formula(input, weight, bias)) {
    return composite::bn_activation(input, weight, bias, batch_statistics, eps, activation);
  }
  if (is_recorded(input, weight, bias)) {
    Statistics found;
    const Tensor output = BnActivation::apply(found, input, weight, bias, batch_statistics, eps, activation);
    return {output, found.mean, found.var, found.inverse};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::_bn_activation().call(input, weight, bias, batch_statistics, eps, activation);
}

void rescale_(Tensor& input, const Tensor& scale, const OptionalTensor& residual, std::string_view post_activation) {
  checks::placement("rescale_", {{"input", input}, {"scale", scale}, {"residual", residual}});
  at::AutoDispatchBelowAutograd below;
  ops::rescale_().call(input, scale, residual, post_activation);
}

void squeeze_excite_(Tensor& input, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                     const OptionalTensor& b2, std::string_view activation, std::string_view gate,
                     const OptionalTensor& residual, std::string_view post_activation) {
  checks::placement("squeeze_excite_",
                    {{"input", input}, {"w1", w1}, {"b1", b1}, {"w2", w2}, {"b2", b2}, {"residual", residual}});
  at::AutoDispatchBelowAutograd below;
  ops::squeeze_excite_().call(input, w1, b1, w2, b2, activation, gate, residual, post_activation);
}

// An in-place op's write, counted, so that autograd notices when a saved tensor was overwritten.
void count_the_write(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const Tensor input = torch::jit::peek(*stack, 0, op.schema().arguments().size()).toTensor();
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  torch::autograd::increment_version(input);
}

// ---- backward: where it is differentiated itself (double backward, forward over reverse), the plain formula, which
// needs nothing that forward saved of the small tensors; they are checked all the same ----

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> excite_backward(const Tensor& grad_output, const Tensor& z,
                                                                   const Tensor& w1, const OptionalTensor& b1,
                                                                   const Tensor& w2, const OptionalTensor& b2,
                                                                   const Tensor& hidden, const Tensor& scale,
                                                                   std::string_view activation, std::string_view gate,
                                                                   std::array<bool, 5> mask) {
  if (is_recorded(grad_output, z, w1, b1, w2, b2) || has_tangents(grad_output, z, w1, b1, w2, b2)) {
    checks::excite_backward(grad_output, z, {w1, b1, w2, b2, activation, gate}, hidden, scale);
    return composite::excite_backward(grad_output, z, w1, b1, w2, b2, activation, gate, mask);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::_excite_backward().call(grad_output, z, w1, b1, w2, b2, hidden, scale, activation, gate, mask);
}

std::tuple<Tensor, Tensor, Tensor> rescale_backward(const Tensor& grad_output, const Tensor& input, const Tensor& scale,
                                                    const OptionalTensor& saved, std::string_view post_activation,
                                                    std::array<bool, 3> mask) {
  if (is_recorded(grad_output, input, scale, saved) || has_tangents(grad_output, input, scale, saved)) {
    checks::rescale_backward(grad_output, input, scale, saved, post_activation);
    return composite::rescale_backward(grad_output, input, scale, saved, post_activation, mask);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::_rescale_backward().call(grad_output, input, scale, saved, post_activation, mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> squeeze_excite_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
    const OptionalTensor& b2, const Tensor& z, const Tensor& hidden, const Tensor& scale, const OptionalTensor& saved,
    std::string_view activation, std::string_view gate, std::string_view post_activation, std::array<bool, 6> mask) {
  if (is_recorded(grad_output, input, w1, b1, w2, b2, saved) ||
      has_tangents(grad_output, input, w1, b1, w2, b2, saved)) {
    checks::squeeze_excite_backward(grad_output, input, {w1, b1, w2, b2, activation, gate}, {z, hidden, scale}, saved,
                                    post_activation);
    return composite::squeeze_excite_backward(grad_output, input, w1, b1, w2, b2, saved, activation, gate,
                                              post_activation, mask);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::_squeeze_excite_backward().call(grad_output, input, w1, b1, w2, b2, z, hidden, scale, saved, activation,
                                              gate, post_activation, mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_squeeze_excite_backward(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& w1, const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2, const Tensor& mean,
    const Tensor& inverse, const Tensor& sample_means, const Tensor& z, const Tensor& hidden, const Tensor& scale,
    const OptionalTensor& saved, const OptionalTensor& drop_scale, bool batch_statistics, double eps,
    std::string_view pre_activation, std::string_view activation, std::string_view gate,
    std::string_view post_activation, std::array<bool, 8> mask) {
  if (is_recorded(grad_output, input, weight, bias, w1, b1, w2, b2, saved) ||
      has_tangents(grad_output, input, weight, bias, w1, b1, w2, b2, saved)) {
    checks::bn_squeeze_excite_backward(grad_output, input, {weight, bias, batch_statistics, pre_activation},
                                       {w1, b1, w2, b2, activation, gate}, {mean, inverse, sample_means},
                                       {z, hidden, scale}, saved, post_activation, drop_scale);
    return composite::bn_squeeze_excite_backward(grad_output, input, weight, bias, w1, b1, w2, b2, saved, drop_scale,
                                                 batch_statistics, eps, pre_activation, activation, gate,
                                                 post_activation, mask);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::_bn_squeeze_excite_backward().call(grad_output, input, weight, bias, w1, b1, w2, b2, mean, inverse,
                                                 sample_means, z, hidden, scale, saved, drop_scale, batch_statistics,
                                                 eps, pre_activation, activation, gate, post_activation, mask);
}

std::tuple<Tensor, Tensor, Tensor> bn_activation_backward(const Tensor& grad_output, const Tensor& input,
                                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                                          const Tensor& mean, const Tensor& inverse,
                                                          bool batch_statistics, double eps,
                                                          std::string_view activation, std::array<bool, 3> mask) {
  if (is_recorded(grad_output, input, weight, bias) || has_tangents(grad_output, input, weight, bias)) {
    checks::bn_activation_backward(grad_output, input, weight, bias, mean, inverse, batch_statistics, activation);
    return composite::bn_activation_backward(grad_output, input, weight, bias, batch_statistics, eps, activation, mask);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::_bn_activation_backward().call(grad_output, input, weight, bias, mean, inverse, batch_statistics, eps,
                                             activation, mask);
}

TORCH_LIBRARY_IMPL(se_ext, Autograd, m) {
  m.impl("squeeze", squeeze);
  m.impl("excite", excite);
  m.impl("rescale", rescale);
  m.impl("squeeze_excite", squeeze_excite);
  m.impl("rescale_", rescale_);
  m.impl("squeeze_excite_", squeeze_excite_);
  m.impl("_excite_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("_excite_backward", excite_backward);
  m.impl("_rescale_backward", rescale_backward);
  m.impl("_squeeze_excite_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("_squeeze_excite_backward", squeeze_excite_backward);
  m.impl("bn_squeeze_excite", bn_squeeze_excite);
  m.impl("_bn_squeeze_excite_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("_bn_squeeze_excite_backward", bn_squeeze_excite_backward);
  m.impl("_bn_activation", bn_activation);
  m.impl("_bn_activation_backward", bn_activation_backward);
}

TORCH_LIBRARY_IMPL(se_ext, ADInplaceOrView, m) {
  m.impl("rescale_", torch::CppFunction::makeFromBoxedFunction<&count_the_write>());
  m.impl("squeeze_excite_", torch::CppFunction::makeFromBoxedFunction<&count_the_write>());
}

}  // namespace
}  // namespace se_ext
