#include "device.h"

namespace se_ext {
namespace {

TORCH_LIBRARY_IMPL(se_ext, SE_EXT_CUDA_KEY, m) {
  Adapters<Cuda>::register_all(m);
}

}  // namespace
}  // namespace se_ext
