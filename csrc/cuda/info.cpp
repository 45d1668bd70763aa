// What this build of the CUDA kernels is. SE_EXT_CUDA_ARCHITECTURES comes from setup.py: "8.0 9.0+PTX".
#include "../info.h"

#include <cuda_runtime_api.h>

#include <iterator>
#include <sstream>

namespace se_ext {

std::string cuda_toolkit() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

std::vector<std::string> cuda_architectures() {
  std::istringstream words(SE_EXT_CUDA_ARCHITECTURES);
  return {std::istream_iterator<std::string>(words), {}};
}

}  // namespace se_ext
