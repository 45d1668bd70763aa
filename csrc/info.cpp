#include "info.h"

#include <torch/version.h>

namespace se_ext {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "GCC " __VERSION__;
#endif
}

std::string torch_version() {
  return TORCH_VERSION;
}

}  // namespace se_ext
