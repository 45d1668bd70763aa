// What csrc/cuda defines of info.h, in a build that leaves that folder out.
#include <stdexcept>

#include "info.h"

namespace se_ext {

std::string cuda_toolkit() {
  return "";
}

std::vector<std::string> cuda_architectures() {
  return {};
}

void set_cuda_path(const std::string&) {
  throw std::invalid_argument("set_cuda_path: se_ext was built without CUDA; build it with FORCE_CUDA=1");
}

std::string cuda_path() {
  return "";
}

std::string last_cuda_path() {
  return "";
}

}  // namespace se_ext
