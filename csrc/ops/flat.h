// An op's arguments in two forms: the flat list that the dispatcher passes, in the order of the schema, and the struct
// that the library passes on (ops.h). A struct is built from the list as an aggregate, and flat() is the list again.
// Tensors are references in both: neither counts references.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

namespace se_ext {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class T>
inline constexpr bool is_tensor = std::is_same_v<T, Tensor> || std::is_same_v<T, OptionalTensor>;

// As the dispatcher passes an argument of type T.
template <class T>
using Parameter = std::conditional_t<is_tensor<T>, const T&, T>;

template <class... T>
std::tuple<Parameter<T>...> flat_list(const T&... arguments) {
  return {arguments...};
}

template <class A>
using Flat = decltype(std::declval<const A&>().flat());

// As the dispatcher returns `count` tensors.
template <std::size_t count, class = std::make_index_sequence<count>>
struct Returned;
template <std::size_t count, std::size_t... i>
struct Returned<count, std::index_sequence<i...>> {
  using type = std::tuple<std::enable_if_t<(i < count), Tensor>...>;
};
template <>
struct Returned<1, std::index_sequence<0>> {
  using type = Tensor;
};
template <>
struct Returned<0, std::index_sequence<>> {
  using type = void;
};

// The first of what an op returns.
inline const Tensor& output_of(const Tensor& result) {
  return result;
}
template <class... T>
const Tensor& output_of(const std::tuple<Tensor, T...>& results) {
  return std::get<0>(results);
}

// The C++ signature of an op with arguments A. What an op without returns writes is its first argument.
template <class Result, class Flat>
struct SignatureOf;
template <class Result, class First, class... Rest>
struct SignatureOf<Result, std::tuple<First, Rest...>> {
  using Written = std::conditional_t<std::is_void_v<Result>, Tensor&, First>;
  using type = Result(Written, Rest...);
};

// The function f of the struct A, as one of the flat list: what the dispatcher is given.
template <class A, auto f, class Signature>
struct FromFlat;
template <class A, auto f, class Result, class... P>
struct FromFlat<A, f, Result(P...)> {
  static Result call(P... arguments) { return f(A{arguments...}); }
};

// What is known of a tensor argument apart from its value, in the order of flat().
enum class Role : std::uint8_t {
  Map,       // of the input's shape; autocast casts it
  Residual,  // a map that is added; autograd may keep the output in its place
  Weight,    // a float32 weight stays so with a half-typed map
  Drawn,     // drawn at random: a weight that gets no gradient
};
struct TensorInfo {
  const char* name;
  Role role;
  bool is_differentiable() const { return role != Role::Drawn; }
};

inline const Tensor* pointer_to(const Tensor& t) {
  return &t;
}
inline const Tensor* pointer_to(const OptionalTensor& t) {
  return t.has_value() ? &*t : nullptr;
}

// f(info, tensor) for each tensor argument, in the order of the schema; null where it is absent.
template <class A, class F>
void for_each_tensor(const A& arguments, F&& f) {
  std::size_t i = 0;
  const auto visit = [&](const auto& argument) {
    if constexpr (is_tensor<std::remove_cvref_t<decltype(argument)>>) f(A::tensors[i++], pointer_to(argument));
  };
  std::apply([&](const auto&... argument) { (visit(argument), ...); }, arguments.flat());
}

// An op's name as a template argument.
template <std::size_t length>
struct Name {
  char characters[length];
  constexpr Name(const char (&name)[length]) { std::copy_n(name, length, characters); }  // NOLINT: from a literal
};

// An op: its name in the namespace, its arguments, how many tensors it returns. Called, it goes through the dispatcher.
template <Name text, class A, std::size_t returns>
struct Op {
  using Arguments = A;
  using Result = typename Returned<returns>::type;
  using Signature = typename SignatureOf<Result, Flat<A>>::type;
  static constexpr const char* name = text.characters;

  Result operator()(const A& arguments) const {
    return std::apply([](const auto&... flat) { return call(flat...); }, arguments.flat());
  }

  template <class First, class... Rest>
  static Result call(const First& first, const Rest&... rest) {
    if constexpr (returns == 0) {
      return handle().call(const_cast<Tensor&>(first), rest...);
    } else {
      return handle().call(first, rest...);
    }
  }

  static bool has_kernel(c10::DispatchKey key) { return handle().hasKernelForDispatchKey(key); }

  // Registers f, a function of the struct.
  template <auto f>
  static void register_with(torch::Library& library) {
    library.impl(name, TORCH_FN((FromFlat<A, f, Signature>::call)));
  }

 private:
  static const c10::TypedOperatorHandle<Signature>& handle() {
    static const auto typed = c10::Dispatcher::singleton()
                                  .findSchemaOrThrow((std::string("se_ext::") + name).c_str(), "")
                                  .template typed<Signature>();
    return typed;
  }
};

}  // namespace se_ext
