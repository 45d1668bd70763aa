// Autocast: the map runs in the autocast dtype, the weights stay as they are (the kernels take float32 weights beside
// a half-typed map). Weights in the other half type, which the kernels refuse, are cast along.
#pragma once

#include <ATen/autocast_mode.h>

#include <optional>
#include <tuple>

#include "../ops/ops.h"

namespace se_ext {

// Turns autocast off for its lifetime, and casts as it would have; does nothing where autocast is off already.
class Autocast {
 public:
  explicit Autocast(const Tensor& input) : device_(input.device().type()) {
    if (device_ != c10::DeviceType::CPU && device_ != c10::DeviceType::CUDA) return;
    const auto key = at::autocast::get_autocast_dispatch_key_from_device_type(device_);
    if (!at::autocast::is_autocast_enabled(device_) || c10::impl::tls_is_dispatch_key_excluded(key)) return;
    to_ = at::autocast::get_autocast_dtype(device_);
    off_.emplace(c10::DispatchKeySet(key));
  }

  // The dtypes that a map and a weight run in.
  at::ScalarType map_type(const Tensor& t) const { return to_ && is_castable(t) ? *to_ : t.scalar_type(); }
  at::ScalarType weight_type(const Tensor& t) const { return t.scalar_type() == at::kFloat ? at::kFloat : map_type(t); }

  // f(arguments), cast by their roles.
  template <class A, class F>
  auto cast(const A& arguments, const F& f) const {
    std::size_t i = 0;
    return std::apply(
        [&](const auto&... argument) {
          // In the order of the list: braces are evaluated from left to right.
          const std::tuple<std::remove_cvref_t<decltype(argument)>...> kept{in_role<A>(i, argument)...};
          return std::apply([&](const auto&... each) { return f(A{each...}); }, kept);
        },
        arguments.flat());
  }

 private:
  template <class A, class T>
  T in_role(std::size_t& i, const T& argument) const {
    if constexpr (is_tensor<T>) {
      const Role role = A::tensors[i++].role;
      const Tensor* t = pointer_to(argument);
      if (t == nullptr) return argument;
      return in_type(*t, role == Role::Map || role == Role::Residual ? map_type(*t) : weight_type(*t));
    } else {
      return argument;
    }
  }

  // Without a call of the dispatcher where there is nothing to cast.
  static Tensor in_type(const Tensor& t, at::ScalarType type) { return t.scalar_type() == type ? t : t.to(type); }
  static bool is_castable(const Tensor& t) { return t.is_floating_point() && t.scalar_type() != at::kDouble; }

  c10::DeviceType device_;
  std::optional<at::ScalarType> to_;
  std::optional<c10::impl::ExcludeDispatchKeyGuard> off_;
};

}  // namespace se_ext
