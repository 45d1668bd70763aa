#include "names.h"

#include <c10/util/Exception.h>

#include <array>
#include <span>
#include <string>

namespace se_ext {
namespace {

struct Named {
  std::string_view name;
  Activation activation;
};

constexpr std::array kActivations = {
    Named{"identity", Activation::Identity},
    Named{"relu", Activation::Relu},
    Named{"relu6", Activation::Relu6},
    Named{"silu", Activation::Silu},
    Named{"gelu", Activation::Gelu},
    Named{"hardswish", Activation::Hardswish},
    Named{"leaky_relu", Activation::LeakyRelu},
    Named{"tanh", Activation::Tanh},
    Named{"sigmoid", Activation::Sigmoid},
};

// Every gate's slope follows from its output, so that backward needs the scale alone.
constexpr std::array kGates = {
    Named{"sigmoid", Activation::Sigmoid},   Named{"hardsigmoid", Activation::Hardsigmoid},
    Named{"tanh", Activation::Tanh},         Named{"relu", Activation::Relu},
    Named{"identity", Activation::Identity},
};

Activation parse(const char* op, const char* argument, std::span<const Named> known, std::string_view name) {
  for (const Named& k : known) {
    if (k.name == name) return k.activation;
  }
  std::string names;
  for (const Named& k : known) {
    if (!names.empty()) names += ", ";
    names += k.name;
  }
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
