// The ops, callable from C++ through the dispatcher.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "checks.h"

namespace se_ext::ops {

using at::Tensor;
using checks::OptionalTensor;

// Named as in library.cpp. A handle is looked up once, at the first call.
#define SE_EXT_OP(name, ...)                                                                       \
  inline const auto& name() {                                                                      \
    static const auto handle =                                                                     \
        c10::Dispatcher::singleton().findSchemaOrThrow("se_ext::" #name, "").typed<__VA_ARGS__>(); \
    return handle;                                                                                 \
  }

SE_EXT_OP(squeeze, Tensor(const Tensor&))
SE_EXT_OP(excite, Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
                         std::string_view, std::string_view))
SE_EXT_OP(rescale, Tensor(const Tensor&, const Tensor&, const OptionalTensor&, std::string_view))
SE_EXT_OP(squeeze_excite,
          Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
                 std::string_view, std::string_view, const OptionalTensor&, std::string_view))
SE_EXT_OP(rescale_, void(Tensor&, const Tensor&, const OptionalTensor&, std::string_view))
SE_EXT_OP(squeeze_excite_, void(Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
                                std::string_view, std::string_view, const OptionalTensor&, std::string_view))
SE_EXT_OP(_excite_forward,
          std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                     const OptionalTensor&, std::string_view, std::string_view))
SE_EXT_OP(_excite_backward,
          std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                             const OptionalTensor&, const Tensor&,
                                                             const OptionalTensor&, const Tensor&, const Tensor&,
                                                             std::string_view, std::string_view, std::array<bool, 5>))
SE_EXT_OP(_rescale_backward,
          std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                             std::string_view, std::array<bool, 3>))
SE_EXT_OP(_squeeze_excite_forward,
          std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                                     const OptionalTensor&, std::string_view, std::string_view,
                                                     const OptionalTensor&, std::string_view))
SE_EXT_OP(_squeeze_excite_backward,
          std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
              const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
              const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, std::string_view, std::string_view,
              std::string_view, std::array<bool, 6>))

SE_EXT_OP(bn_squeeze_excite,
          std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                                             const OptionalTensor&, const Tensor&, const OptionalTensor&, bool, double,
                                             std::string_view, std::string_view, std::string_view,
                                             const OptionalTensor&, std::string_view, const OptionalTensor&))
SE_EXT_OP(_bn_squeeze_excite_forward,
          std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
              const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
              const Tensor&, const OptionalTensor&, bool, double, std::string_view, std::string_view, std::string_view,
              const OptionalTensor&, std::string_view, const OptionalTensor&))
SE_EXT_OP(_bn_squeeze_excite_backward,
          std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
              const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
              const OptionalTensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&,
              const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, bool, double,
              std::string_view, std::string_view, std::string_view, std::string_view, std::array<bool, 8>))

SE_EXT_OP(_bn_activation,
          std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&, const OptionalTensor&, bool,
                                                     double, std::string_view))
SE_EXT_OP(_bn_activation_backward,
          std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                             const Tensor&, const Tensor&, bool, double, std::string_view,
                                             std::array<bool, 3>))

#undef SE_EXT_OP

}  // namespace se_ext::ops
