// For Python, which reaches this library through ctypes.
#include "../../csrc/info.h"

extern "C" __attribute__((visibility("default"))) void cuda_host_set_path(const char* path) {
  se_ext::set_cuda_path(path);
}
