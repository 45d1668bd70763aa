#include "activation_names.h"

#include <c10/util/Exception.h>

#include <span>
#include <string>

namespace se_ext {
namespace {

Activation parse(const char* op, const char* argument, std::span<const Activation> allowed, std::string_view name) {
  const auto name_of = [](Activation a) { return kActivationNames[static_cast<int>(a)]; };
  for (const Activation a : allowed) {
    if (name_of(a) == name) return a;
  }
  std::string names;
  for (const Activation a : allowed) names += (names.empty() ? "" : ", ") + std::string(name_of(a));
  TORCH_CHECK_VALUE(false, op, ": expected ", argument, " to be one of ", names, ", got \"", name, "\"");
}

}  // namespace

Activation parse_activation(const char* op, const char* argument, std::string_view name) {
  return parse(op, argument, kActivations, name);
}

Activation parse_gate(const char* op, std::string_view name) {
  return parse(op, "gate", kGates, name);
}

}  // namespace se_ext
