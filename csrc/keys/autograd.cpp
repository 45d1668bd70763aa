// Autograd for the public ops, in C++. Saved for backward: the inputs, the small z, hidden and scale, and of full size
// only what the last activation's slope needs (see RescaleBackward in params.h).
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/stack.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>

#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "../formula/formula.h"
#include "../ops/activation_names.h"
#include "../ops/checks.h"

namespace se_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool is_recorded(const Tensor& t) {
  return c10::GradMode::is_enabled() && t.requires_grad();
}
bool has_tangent(const Tensor& t) {
  return t._fw_grad(/*level=*/0).defined();
}

// Whether `holds` for one of the tensors that may be differentiated, or for any at all.
template <class A, class F>
bool any_differentiable(const A& a, const F& holds) {
  bool any = false;
  checks::for_each_present(
      a, [&](const TensorInfo& info, const Tensor& t) { any = any || (info.is_differentiable() && holds(t)); });
  return any;
}
template <class A, class F>
bool any(const A& a, const F& holds) {
  bool any = false;
  checks::for_each_present(a, [&](const TensorInfo&, const Tensor& t) { any = any || holds(t); });
  return any;
}

bool has_kernels(const Tensor& input) {
  switch (input.device().type()) {
    case c10::DeviceType::CPU:
    case c10::DeviceType::Meta:
      return true;
    case c10::DeviceType::CUDA:
      return ops::squeeze.has_kernel(c10::DispatchKey::CUDA);
    default:
      return false;
  }
}

// Forward-mode AD, and devices without kernels, go through the plain formula.
template <class A>
bool needs_formula(const A& a) {
  return any(a, has_tangent) || !has_kernels(a.input);
}

template <class Op>
typename Op::Result below_autograd(const typename Op::Arguments& a) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return Op()(a);
}

template <class T>
std::tuple<T> as_tuple(T t) {
  return {std::move(t)};
}
template <class... T>
std::tuple<T...> as_tuple(std::tuple<T...> t) {
  return t;
}

// ---- squeeze, whose gradient is a view ----

struct SqueezeNode : torch::autograd::Function<SqueezeNode> {
  static constexpr bool is_traceable = true;  // as below

  static Tensor forward(AutogradContext* ctx, const Tensor& input) {
    ctx->saved_data["sizes"] = input.sym_sizes();
    return below_autograd<decltype(ops::squeeze)>({input});
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

Tensor squeeze(const ops::Squeeze& a) {
  checks::placement(a.name, a);
  if (needs_formula(a)) return formula::compute(a);
  if (is_recorded(a.input)) return SqueezeNode::apply(a.input);
  return below_autograd<decltype(ops::squeeze)>(a);
}

// ---- every other op: a node that keeps its arguments and what its forward op left ----

// Where the residual stands among the tensors of A; behind the last one without a residual.
template <class A>
constexpr std::size_t residual_of() {
  std::size_t i = 0;
  while (i < std::size(A::tensors) && A::tensors[i].role != Role::Residual) ++i;
  return i;
}

// The tail of A's arguments.
template <class A>
ops::Tail tail_of(const A& a) {
  if constexpr (requires { a.tail(); }) {
    return a.tail();
  } else {
    return a.tail;
  }
}

// What backward needs in the residual's place, besides x and scale.
Tensor saved_for(const char* op, const ops::Tail& tail, const Tensor& output) {
  const Activation post = parse_activation(op, "the last activation", tail.post_activation);  // checked already
  if (!tail.residual.has_value() || post == Activation::Identity) return Tensor();
  return slope_from_output(post) ? output : *tail.residual;
}

// An op's arguments as a node keeps them: tensors, absent ones undefined, and the other values apart.
struct Kept {
  variable_list tensors;
  std::vector<c10::IValue> options;

  Kept() {  // room for those of the op that has most
    tensors.reserve(16);
    options.reserve(8);
  }
  void add(const Tensor& t) { tensors.push_back(t); }
  void add(const OptionalTensor& t) { tensors.push_back(t.value_or(Tensor())); }
  void add(std::string_view name) { options.emplace_back(std::string(name)); }
  void add(bool value) { options.emplace_back(value); }
  void add(double value) { options.emplace_back(value); }
  void add(at::IntArrayRef list) { options.emplace_back(list); }
};

// The same read back, one after the other.
struct Reader {
  const variable_list& tensors;
  c10::ArrayRef<c10::IValue> options;
  std::size_t tensor = 0;
  std::size_t option = 0;
  std::deque<std::vector<std::int64_t>> lists{};  // what the IntArrayRefs refer to

  template <class T>
  T next() {
    if constexpr (std::is_same_v<T, Tensor>) {
      return tensors[tensor++];
    } else if constexpr (std::is_same_v<T, OptionalTensor>) {
      const Tensor& t = tensors[tensor++];
      return t.defined() ? OptionalTensor(t) : std::nullopt;
    } else if constexpr (std::is_same_v<T, std::string_view>) {
      return options[option++].toStringView();
    } else if constexpr (std::is_same_v<T, bool>) {
      return options[option++].toBool();
    } else if constexpr (std::is_same_v<T, at::IntArrayRef>) {
      return lists.emplace_back(options[option++].toIntVector());
    } else {
      static_assert(std::is_same_v<T, double>);
      return options[option++].toDouble();
    }
  }
};

// The values of a flat list, which reader gives in this order: braces are evaluated from left to right.
template <class... P>
std::tuple<std::remove_cvref_t<P>...> read_all(Reader& reader, std::type_identity<std::tuple<P...>>) {
  return {reader.next<std::remove_cvref_t<P>>()...};
}

template <class Recording>
struct Node : torch::autograd::Function<Node<Recording>> {
  using A = typename Recording::Op::Arguments;
  using Results = decltype(as_tuple(std::declval<typename Recording::Op::Result>()));
  static constexpr std::size_t kGradients = std::tuple_size_v<typename Recording::Backward::Result>;
  static constexpr std::size_t kResidual = residual_of<A>();
  static constexpr bool kHasTail = kResidual < std::size(A::tensors);
  // For compiled autograd: backward reads the context and calls ops, nothing else.
  static constexpr bool is_traceable = true;

  // Fills `results`, beside the output with what is not differentiable. Those don't pass through autograd, whose
  // wrapping of a result costs more than the computation of a small vector.
  template <class... P>
  static Tensor forward(AutogradContext* ctx, Results& results, const P&... arguments) {
    const A a{arguments...};
    const auto computed = as_tuple(below_autograd<typename Recording::Forward>(a));
    const Tensor& output = std::get<0>(computed);
    [&]<std::size_t... i>(std::index_sequence<i...>) {
      results = Results{std::get<i>(computed)...};
    }(std::make_index_sequence<std::tuple_size_v<Results>>());

    Kept kept;
    (kept.add(arguments), ...);
    if constexpr (kHasTail) {
      kept.tensors[kResidual] = saved_for(A::name, tail_of(a), output);
      kept.add(tail_of(a).residual.has_value());
    }
    [&]<std::size_t... i>(std::index_sequence<i...>) {
      (kept.add(std::get<i>(computed)), ...);
    }(typename Recording::Saved());
    ctx->save_for_backward(std::move(kept.tensors));
    ctx->saved_data["options"] = c10::ivalue::Tuple::create(std::move(kept.options));
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list tensors = ctx->get_saved_variables();
    Reader reader{tensors, ctx->saved_data["options"].toTupleRef().elements().asArrayRef()};
    const auto arguments = read_all(reader, std::type_identity<Flat<A>>());
    const auto left = read_all(reader, std::type_identity<SavedTensors>());
    const bool has_residual = kHasTail && reader.next<bool>();

    // Of forward's tensors, absent ones want no gradient, and autograd doesn't count them.
    std::array<bool, kGradients> mask{};
    std::size_t edge = 0;
    for (std::size_t i = 0; i < kGradients; ++i) {
      const bool is_present = i == kResidual ? has_residual : tensors[i].defined();
      mask[i] = is_present && ctx->needs_input_grad(edge++);
    }
    // Without an activation behind it, the residual's gradient is the output's.
    bool passes_on = false;
    if constexpr (kHasTail) {
      const A a = std::apply([](const auto&... argument) { return A{argument...}; }, arguments);
      passes_on = mask[kResidual] && tail_of(a).post_activation == "identity";
      if (passes_on) mask[kResidual] = false;
    }
    const auto computed = std::apply([](const auto&... argument) { return Recording::Backward::call(argument...); },
                                     std::tuple_cat(std::tie(grads[0]), arguments, left, std::tie(mask)));
    std::array<Tensor, kGradients> gradients =
        std::apply([](const auto&... gradient) { return std::array{gradient...}; }, computed);
    if constexpr (kHasTail) {
      if (passes_on) gradients[kResidual] = grads[0];
    }
    return spread(gradients, std::type_identity<Flat<A>>());
  }

 private:
  template <std::size_t... saved>
  static std::tuple<std::conditional_t<(saved >= 0), Tensor, void>...> tensors_of(std::index_sequence<saved...>);
  using SavedTensors = decltype(tensors_of(typename Recording::Saved()));

  // One gradient for `results`, which has none, and one for every argument.
  template <class... P>
  static variable_list spread(const std::array<Tensor, kGradients>& gradients, std::type_identity<std::tuple<P...>>) {
    variable_list all{Tensor()};
    std::size_t next = 0;
    (all.push_back(is_tensor<std::remove_cvref_t<P>> && next < kGradients ? gradients[next++] : Tensor()), ...);
    return all;
  }
};

template <class Recording>
typename Recording::Op::Result record(const typename Recording::Op::Arguments& a) {
  using Op = typename Recording::Op;
  checks::placement(a.name, a);
  checks::for_each_present(a, [&](const TensorInfo& info, const Tensor& t) {
    TORCH_CHECK(info.is_differentiable() || !is_recorded(t), a.name, ": expected ", info.name,
                " that does not require grad (it is drawn at random, and gets no gradient), got one that does");
  });
  if (needs_formula(a)) return formula::compute(a);
  if (!any_differentiable(a, is_recorded)) return below_autograd<Op>(a);
  typename Node<Recording>::Results results;
  Tensor& output = std::get<0>(results);
  try {
    output =
        std::apply([&](const auto&... argument) { return Node<Recording>::apply(results, argument...); }, a.flat());
  } catch (...) {
    // Where memory runs out after the output has got its node and before the node has saved it as its own output, the
    // two keep each other and the saved maps alive.
    if (output.defined()) output.unsafeGetTensorImpl()->set_autograd_meta(nullptr);
    throw;
  }
  if constexpr (std::tuple_size_v<decltype(results)> == 1) {
    return std::get<0>(results);
  } else {
    return results;
  }
}

// Where backward is differentiated itself (double backward, forward over reverse), the plain formula: it needs nothing
// that forward saved of the small tensors, which are checked all the same.
template <class Op>
typename Op::Result backward(const typename Op::Arguments& a) {
  const auto is_differentiated = [](const Tensor& t) { return is_recorded(t) || has_tangent(t); };
  if (is_differentiated(a.grad_output) || any_differentiable(a.forward, is_differentiated)) {
    return std::tuple_cat(formula::compute(a));
  }
  return below_autograd<Op>(a);
}

// ---- in place ----

template <class Op>
void in_place(const typename Op::Arguments& a) {
  checks::placement(Op::name, a);
  const at::AutoDispatchBelowAutograd below;
  Op()(a);
}

// An in-place op's write, counted, so that autograd notices when a saved tensor was overwritten.
void count_the_write(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const Tensor input = torch::jit::peek(*stack, 0, op.schema().arguments().size()).toTensor();
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  torch::autograd::increment_version(input);
}

TORCH_LIBRARY_IMPL(se_ext, Autograd, m) {
  decltype(ops::squeeze)::register_with<squeeze>(m);
  ops::for_each(ops::differentiable, [&]<class Recording>(Recording) {
    using Op = typename Recording::Op;
    using Forward = typename Recording::Forward;
    using Backward = typename Recording::Backward;
    Op::template register_with<record<Recording>>(m);
    Backward::template register_with<backward<Backward>>(m);
    if constexpr (!std::is_same_v<Op, Forward>) {
      m.impl(Forward::name, torch::autograd::autogradNotImplementedFallback());
    }
  });
  ops::for_each(ops::in_place, [&]<class Op>(Op) { Op::template register_with<in_place<Op>>(m); });
}

TORCH_LIBRARY_IMPL(se_ext, ADInplaceOrView, m) {
  ops::for_each(ops::in_place,
                [&](auto op) { m.impl(op.name, torch::CppFunction::makeFromBoxedFunction<&count_the_write>()); });
}

}  // namespace
}  // namespace se_ext
