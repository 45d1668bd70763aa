// The GPU that an op runs on, and the key that its kernels are registered for.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdint>

#include "../ops/adapters.h"

// tests/cuda_host runs the same adapters on CPU tensors.
#ifndef SE_EXT_CUDA_KEY
#define SE_EXT_CUDA_KEY CUDA
#endif

namespace se_ext {

struct Cuda {
  struct Guard : c10::cuda::CUDAGuard {
    explicit Guard(const Tensor& t) : c10::cuda::CUDAGuard(t.device()) {}
  };
};

}  // namespace se_ext

namespace se_ext::cuda {

struct Device {
  int multiprocessors;
  std::int64_t l2_bytes;
  std::int64_t shared_per_block, shared_per_multiprocessor, shared_reserved;  // bytes
  double bytes_per_us;                                                        // of far memory
};

// Of the current device; asked for once per device.
const Device& current_device();

}  // namespace se_ext::cuda
