// A stand-in for torch's header: there is one stream, on which a launch is done when it returns; outside of a device
// guard it is another device's.
#pragma once

#include <c10/core/Device.h>

#include "cuda_runtime.h"

namespace c10::cuda {

struct CUDAStream {
  cudaStream_t stream() const { return cuda_host::guards > 0 ? cuda_host::kStream : nullptr; }
  operator cudaStream_t() const { return stream(); }
};

inline CUDAStream getCurrentCUDAStream(DeviceIndex = -1) {
  return {};
}

}  // namespace c10::cuda
