// What runtime.cpp asks of device.cpp.
#pragma once

#include "cuda_runtime.h"

namespace cuda_host {

struct Launch {
  dim3 grid, block, cluster;
  std::size_t shared_bytes;
  const void* kernel;
  void (*body)(void*);
  void* arguments;
  bool knows_clusters;  // else the device's code was compiled for a GPU without: a block takes itself for the only one
};

// One launch at a time; the caller sees to it.
void run(const Launch& launch);

}  // namespace cuda_host
