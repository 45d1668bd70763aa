// A stand-in for torch's header: there is one device, the CPU.
#pragma once

#include <c10/core/Device.h>

#include "cuda_runtime.h"

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(Device) {
    cuda_host::has_guards = true;
    ++cuda_host::guards;
  }
  ~CUDAGuard() { --cuda_host::guards; }
  CUDAGuard(const CUDAGuard&) = delete;
  CUDAGuard& operator=(const CUDAGuard&) = delete;
};

}  // namespace c10::cuda
