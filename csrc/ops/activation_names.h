// The activations' public names.
#pragma once

#include <string_view>

#include "activation.h"

namespace se_ext {

// Both raise for a name that is not allowed there: `<op>: expected <argument> to be one of …, got "…"`.
Activation parse_activation(const char* op, const char* argument, std::string_view name);
Activation parse_gate(const char* op, std::string_view name);

}  // namespace se_ext
