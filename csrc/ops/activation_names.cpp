#include "activation_names.h"

#include <c10/util/Exception.h>

#include <iterator>
#include <string>

namespace se_ext {
namespace {

template <class Allowed>
Activation parse(const char* op, const char* argument, std::string_view name, const Allowed& is_allowed) {
  for (std::size_t i = 0; i < std::size(kActivations); ++i) {
    if (kActivations[i].name == name && is_allowed(kActivations[i])) return static_cast<Activation>(i);
  }
  std::string names;
  for (const NamedActivation& known : kActivations) {
    if (is_allowed(known)) names += (names.empty() ? "" : ", ") + std::string(known.name);
  }
  TORCH_CHECK_VALUE(false, op, ": expected ", argument, " to be one of ", names, ", got \"", name, "\"");
}

}  // namespace

Activation parse_activation(const char* op, const char* argument, std::string_view name) {
  return parse(op, argument, name, [](const NamedActivation& a) { return a.is_activation; });
}

Activation parse_gate(const char* op, std::string_view name) {
  return parse(op, "gate", name, [](const NamedActivation& a) { return a.is_gate; });
}

}  // namespace se_ext
