// The ops with a batch norm as a module calls them: training updates the running statistics, evaluation reads them.
// They are written in ATen operators and the op itself, which autograd, autocast and torch.compile then see. They are
// in C++, because six operators on [C] vectors, called from Python one by one, take as long as the kernels do on a
// small map. On plain tensors, with no mode, transform or tracer active, loops replace these operators.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <cmath>

#include "../keys/autocast.h"
#include "../ops/allocate.h"
#include "../ops/checks.h"

namespace se_ext {
namespace {

// Whether no mode, transform or tracer is active.
bool is_nothing_active() {
  constexpr auto harmless = c10::default_included_set | c10::DispatchKeySet(c10::DispatchKey::AutocastCPU);
  return (c10::impl::tls_local_dispatch_key_set().included_ - harmless).empty();
}

// Whether an operator on `t` would then run the CPU's kernel and nothing else, recording for autograd apart: subclasses
// of Tensor have dispatch keys of their own.
bool is_plain(const Tensor& t, at::ScalarType type) {
  constexpr c10::DispatchKeySet keys({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                      c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutocastCPU});
  return t.key_set() == keys && t.is_contiguous() && t.scalar_type() == type;
}
// And whether it may be written: else it has to get ATen's error.
bool is_plain_to_write(const OptionalTensor& t, at::ScalarType type) {
  return !t.has_value() || (is_plain(*t, type) && !t->requires_grad());
}
// And whether no derivative is taken with respect to it.
bool is_plain_constant(const OptionalTensor& t, at::ScalarType type) {
  return !t.has_value() || (is_plain(*t, type) && !(c10::GradMode::is_enabled() && t->requires_grad()) &&
                            !t->_fw_grad(/*level=*/0).defined());
}

// What training updates: running += part · (of_batch - running), part being momentum, or 1 / batches where there is
// none; batches counts.
struct Running {
  OptionalTensor mean, var, batches;
  std::optional<double> momentum;

  bool moves() const { return momentum.has_value() || batches.has_value(); }
};

void move(const Tensor& running, const Tensor& of_batch, const Running& r) {
  const auto moved = [&](auto&& lerp) {
    return r.momentum.has_value() ? lerp(at::Scalar(*r.momentum))
                                  : lerp(at::reciprocal(r.batches->to(of_batch.scalar_type())));
  };
  if (running.scalar_type() == of_batch.scalar_type()) {
    moved([&](const auto& part) { return running.lerp_(of_batch, part); });
  } else {
    running.copy_(moved([&](const auto& part) { return running.to(of_batch.scalar_type()).lerp_(of_batch, part); }));
  }
}

// values: of each channel in the batch; var is biased.
void update(const Running& r, const Tensor& mean, const Tensor& var, const c10::SymInt& values) {
  if (r.batches.has_value()) r.batches->add_(1);
  if (!r.moves() || !(values > 1)) return;
  if (r.mean.has_value()) move(*r.mean, mean, r);
  if (r.var.has_value()) {
    const c10::SymFloat unbiased = static_cast<c10::SymFloat>(values) / static_cast<c10::SymFloat>(values - 1);
    move(*r.var, var * at::Scalar(unbiased), r);
  }
}

bool is_plain(const Running& r, const Tensor& mean, const Tensor& var) {
  const auto type = mean.scalar_type();
  const auto is_plain_statistic = [&](const OptionalTensor& t) {
    return is_plain_to_write(t, type) || is_plain_to_write(t, at::kHalf) || is_plain_to_write(t, at::kBFloat16);
  };
  return is_nothing_active() && is_plain_to_write(mean, type) && is_plain_to_write(var, type) &&
         is_plain_statistic(r.mean) && is_plain_statistic(r.var) && is_plain_to_write(r.batches, at::kLong) &&
         (!r.batches.has_value() || r.batches->numel() == 1);
}

// The same on plain tensors in plain loops: five operators take longer than a few hundred values do. And the loops
// allocate nothing: no failure can leave one statistic updated and another not.
template <class A>
void update_in_loops(const Running& r, const Tensor& mean, const Tensor& var, std::int64_t values) {
  const auto written = [](const Tensor& t) { t.unsafeGetTensorImpl()->bump_version(); };
  if (r.batches.has_value()) {
    ++*r.batches->mutable_data_ptr<std::int64_t>();
    written(*r.batches);
  }
  if (!r.moves() || values <= 1) return;
  const double of_batches = r.batches.has_value() ? 1.0 / *r.batches->const_data_ptr<std::int64_t>() : 0;
  const A part = static_cast<A>(r.momentum.value_or(of_batches));
  const auto move_all = [&](const Tensor& running, const Tensor& of_batch, A factor) {
    const A* from = of_batch.const_data_ptr<A>();
    const auto move_to = [&]<class T>(T* to) {
      for (std::int64_t c = 0; c < running.numel(); ++c) {  // at::lerp's two forms
        const A before = static_cast<A>(to[c]), off = from[c] * factor - before;
        to[c] = static_cast<T>(part < A(0.5) ? before + part * off : from[c] * factor - off * (1 - part));
      }
    };
    if (running.scalar_type() == at::kHalf) {
      move_to(running.mutable_data_ptr<at::Half>());
    } else if (running.scalar_type() == at::kBFloat16) {
      move_to(running.mutable_data_ptr<at::BFloat16>());
    } else {
      move_to(running.mutable_data_ptr<A>());
    }
    written(running);
  };
  if (r.mean.has_value()) move_all(*r.mean, mean, 1);
  if (r.var.has_value()) {
    move_all(*r.var, var, static_cast<A>(static_cast<double>(values) / static_cast<double>(values - 1)));
  }
}

// By the statistics of a batch `input`.
void update(const Running& running, const Tensor& input, const Tensor& mean, const Tensor& var) {
  const c10::SymInt values = input.sym_numel() / input.sym_size(1).max(1);  // per channel
  const auto known = values.maybe_as_int();
  if (!known.has_value() || !is_plain(running, mean, var)) {
    update(running, mean, var, values);
  } else if (mean.scalar_type() == at::kDouble) {
    update_in_loops<double>(running, mean, var, *known);
  } else {
    update_in_loops<float>(running, mean, var, *known);
  }
}

// A batch norm's vectors and statistics, as a module holds them.
struct BatchNormModule {
  const OptionalTensor &weight, &bias;
  const char *weight_name, *bias_name;
  Running running;
  bool training;
  double eps;
};

void check_statistics(const char* op, const Tensor& input, const BatchNormModule& bn) {
  const OptionalTensor &mean = bn.running.mean, &var = bn.running.var;
  checks::running_statistic(op, "running_mean", mean, input);
  checks::running_statistic(op, "running_var", var, input);
  TORCH_CHECK(bn.training || (mean.has_value() && var.has_value()), op,
              ": expected running_mean and running_var when training is False, got None");
}

void check_folded(const char* op, const Tensor& input, const BatchNormModule& bn) {
  const Autocast cast(input);
  const auto check = [&](const char* name, const OptionalTensor& vector) {
    const auto type = vector.has_value() ? cast.weight_type(*vector) : at::ScalarType::Undefined;
    checks::folded_vector(op, name, vector, type, input, cast.map_type(input));
  };
  check(bn.weight_name, bn.weight);
  check(bn.bias_name, bn.bias);
}

// What the batch norm is with its running statistics: a = weight / sqrt(var + eps), b = bias - mean a, [C], in the
// accumulation type. Gradients flow to weight and bias.
std::pair<Tensor, Tensor> fold(const BatchNormModule& bn, at::ScalarType type) {
  Tensor a = at::rsqrt(bn.running.var->to(type) + bn.eps);
  if (bn.weight.has_value()) a = a * bn.weight->to(type);
  const Tensor product = bn.running.mean->to(type) * a;
  return {a, bn.bias.has_value() ? bn.bias->to(type) - product : at::neg(product)};
}

// The same of plain tensors in a plain loop, as in update_in_loops.
template <class A>
std::pair<Tensor, Tensor> fold_in_a_loop(const BatchNormModule& bn) {
  const auto data = [](const OptionalTensor& t) { return t.has_value() ? t->const_data_ptr<A>() : nullptr; };
  const A *mean = data(bn.running.mean), *var = data(bn.running.var), *weight = data(bn.weight), *bias = data(bn.bias);
  const Tensor a = at::empty(bn.running.mean->sizes(), bn.running.mean->options()),
               b = at::empty(a.sizes(), a.options());
  A *a_of = a.mutable_data_ptr<A>(), *b_of = b.mutable_data_ptr<A>();
  for (std::int64_t c = 0; c < a.numel(); ++c) {
    const A inverse = A(1) / std::sqrt(var[c] + static_cast<A>(bn.eps));
    a_of[c] = weight ? inverse * weight[c] : inverse;
    b_of[c] = (bias ? bias[c] : A(0)) - mean[c] * a_of[c];
  }
  return {a, b};
}

// Of a batch norm that is not training, for the op on `input`.
std::pair<Tensor, Tensor> folded(const char* op, const Tensor& input, const BatchNormModule& bn) {
  check_folded(op, input, bn);
  const auto type = accumulation_type(input.scalar_type());
  const auto is_constant = [&](const OptionalTensor& t) { return is_plain_constant(t, type); };
  const bool in_a_loop = is_nothing_active() && is_constant(bn.running.mean) && is_constant(bn.running.var) &&
                         is_constant(bn.weight) && is_constant(bn.bias);
  if (!in_a_loop) return fold(bn, type);
  return type == at::kDouble ? fold_in_a_loop<double>(bn) : fold_in_a_loop<float>(bn);
}

// call(weight, bias, batch_statistics) is the op on the batch norm's weight and bias where it is training, else on what
// they and the running statistics fold into; it returns the output and the statistics of the batch.
template <class F>
Tensor with_running_statistics(const char* op, const Tensor& input, const BatchNormModule& bn, const F& call) {
  check_statistics(op, input, bn);
  if (!bn.training) {
    const auto [a, b] = folded(op, input, bn);
    return std::get<0>(call(a, b, /*batch_statistics=*/false));
  }
  const auto results = call(bn.weight, bn.bias, /*batch_statistics=*/true);
  update(bn.running, input, std::get<1>(results), std::get<2>(results));
  return std::get<0>(results);
}

Tensor bn_squeeze_excite(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& running_mean, const OptionalTensor& running_var,
                         const OptionalTensor& batches, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                         const OptionalTensor& b2, bool training, std::optional<double> momentum, double eps,
                         std::string_view pre_activation, std::string_view activation, std::string_view gate,
                         const OptionalTensor& residual, std::string_view post_activation,
                         const OptionalTensor& drop_scale) {
  const BatchNormModule bn{weight,   bias, "bn_weight", "bn_bias", {running_mean, running_var, batches, momentum},
                           training, eps};
  return with_running_statistics("bn_squeeze_excite", input, bn,
                                 [&](const OptionalTensor& a, const OptionalTensor& b, bool batch_statistics) {
                                   return ops::bn_squeeze_excite({input,
                                                                  a,
                                                                  b,
                                                                  w1,
                                                                  b1,
                                                                  w2,
                                                                  b2,
                                                                  batch_statistics,
                                                                  eps,
                                                                  pre_activation,
                                                                  activation,
                                                                  gate,
                                                                  {residual, post_activation},
                                                                  drop_scale});
                                 });
}

Tensor bn_activation(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& running_mean, const OptionalTensor& running_var,
                     const OptionalTensor& batches, bool training, std::optional<double> momentum, double eps,
                     std::string_view activation, const OptionalTensor& residual, const OptionalTensor& drop_scale) {
  const BatchNormModule bn{weight,   bias, "weight", "bias", {running_mean, running_var, batches, momentum},
                           training, eps};
  return with_running_statistics(
      "bn_activation", input, bn, [&](const OptionalTensor& a, const OptionalTensor& b, bool batch_statistics) {
        return ops::_bn_activation({input, a, b, batch_statistics, eps, activation, residual, drop_scale});
      });
}

// In place, of a batch norm that is not training.

void bn_squeeze_excite_(Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                        const Tensor& var, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                        const OptionalTensor& b2, double eps, std::string_view pre_activation,
                        std::string_view activation, std::string_view gate, const OptionalTensor& residual,
                        std::string_view post_activation, const OptionalTensor& drop_scale) {
  const BatchNormModule bn{weight, bias, "bn_weight", "bn_bias", {mean, var, {}, {}}, /*training=*/false, eps};
  check_statistics(ops::_bn_squeeze_excite_.name, input, bn);
  const auto [a, b] = folded(ops::_bn_squeeze_excite_.name, input, bn);
  const OptionalTensor folded_weight(a), folded_bias(b);
  ops::_bn_squeeze_excite_({input,
                            folded_weight,
                            folded_bias,
                            w1,
                            b1,
                            w2,
                            b2,
                            /*batch_statistics=*/false,
                            eps,
                            pre_activation,
                            activation,
                            gate,
                            {residual, post_activation},
                            drop_scale});
}

void bn_activation_(Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                    const Tensor& var, double eps, std::string_view activation, const OptionalTensor& residual,
                    const OptionalTensor& drop_scale) {
  const BatchNormModule bn{weight, bias, "weight", "bias", {mean, var, {}, {}}, /*training=*/false, eps};
  check_statistics(ops::_bn_activation_.name, input, bn);
  const auto [a, b] = folded(ops::_bn_activation_.name, input, bn);
  const OptionalTensor folded_weight(a), folded_bias(b);
  ops::_bn_activation_(
      {input, folded_weight, folded_bias, /*batch_statistics=*/false, eps, activation, residual, drop_scale});
}

void register_all(torch::Library& m) {
  m.impl("_bn_squeeze_excite_running", bn_squeeze_excite);
  m.impl("_bn_activation_running", bn_activation);
  m.impl("_bn_squeeze_excite_running_", bn_squeeze_excite_);
  m.impl("_bn_activation_running_", bn_activation_);
}

TORCH_LIBRARY_IMPL(se_ext, CompositeImplicitAutograd, m) {
  register_all(m);
}
// For torch.func, which transforms what the op is made of.
TORCH_LIBRARY_IMPL(se_ext, FuncTorchDynamicLayerFrontMode, m) {
  register_all(m);
}
// For views that negate: torch's fallback takes the op as a whole, and the tensors that it writes for its outputs.
TORCH_LIBRARY_IMPL(se_ext, Negative, m) {
  register_all(m);
}

}  // namespace
}  // namespace se_ext
