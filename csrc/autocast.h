// Autocast: the map runs in the autocast dtype, the weights stay as they are (the kernels take float32 weights beside
// a half-typed map). Weights in the other half type, which the kernels refuse, are cast along.
#pragma once

#include <ATen/autocast_mode.h>

#include <optional>

#include "checks.h"

namespace se_ext {

// Turns autocast off for its lifetime, and casts as it would have; does nothing where autocast is off already.
class Autocast {
 public:
  explicit Autocast(const at::Tensor& input) : device_(input.device().type()) {
    if (device_ != c10::DeviceType::CPU && device_ != c10::DeviceType::CUDA) return;
    const auto key = at::autocast::get_autocast_dispatch_key_from_device_type(device_);
    if (!at::autocast::is_autocast_enabled(device_) || c10::impl::tls_is_dispatch_key_excluded(key)) return;
    to_ = at::autocast::get_autocast_dtype(device_);
    off_.emplace(c10::DispatchKeySet(key));
  }

  // The dtypes that a map and a weight run in.
  at::ScalarType map_type(const at::Tensor& t) const { return to_ && is_castable(t) ? *to_ : t.scalar_type(); }
  at::ScalarType weight_type(const at::Tensor& t) const {
    return t.scalar_type() == at::kFloat ? at::kFloat : map_type(t);
  }

  at::Tensor map(const at::Tensor& t) const { return in_type(t, map_type(t)); }
  at::Tensor weight(const at::Tensor& t) const { return in_type(t, weight_type(t)); }
  checks::OptionalTensor map(const checks::OptionalTensor& t) const { return t ? checks::OptionalTensor(map(*t)) : t; }
  checks::OptionalTensor weight(const checks::OptionalTensor& t) const {
    return t ? checks::OptionalTensor(weight(*t)) : t;
  }

 private:
  // Without a call of the dispatcher where there is nothing to cast.
  static at::Tensor in_type(const at::Tensor& t, at::ScalarType type) {
    return t.scalar_type() == type ? t : t.to(type);
  }
  static bool is_castable(const at::Tensor& t) { return t.is_floating_point() && t.scalar_type() != at::kDouble; }

  c10::DeviceType device_;
  std::optional<at::ScalarType> to_;
  std::optional<c10::impl::ExcludeDispatchKeyGuard> off_;
};

}  // namespace se_ext
