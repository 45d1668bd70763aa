// Whether a kernel can be launched in clusters of thread blocks: what the driver says of it, asked once.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace se_ext::cuda {

// Lets a launch of the kernel have all the shared memory that the current device gives a thread block. The limit is set
// once per kernel and device, and never lowered: a limit set for each launch could be lowered by another host thread
// before that launch is made.
cudaError_t allow_shared_memory(const void* kernel);

// A cluster of `blocks` thread blocks. One block is launched as a thread block without a cluster.
struct ClusterShape {
  int blocks, threads;        // threads per block
  std::int64_t shared_bytes;  // of each block
};

// Whether the current device has room for one such cluster of the kernel and more. A part of a GPU (MIG, MPS) may have
// none. False, too, where the kernel was compiled for a GPU without clusters: a newer GPU runs it, but in that code
// every thread block takes itself for the only one.
bool can_launch(const void* kernel, const ClusterShape& cluster);

}  // namespace se_ext::cuda
