#include "clusters.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

namespace se_ext::cuda {
namespace {

// A kernel on a device.
struct Known {
  bool has_clusters;
  std::map<std::pair<int, std::int64_t>, bool> can_launch;  // (blocks, shared_bytes) →
};

std::mutex mutex;
std::map<std::pair<const void*, int>, Known> known;

cudaError_t ask(const void* kernel, int device, Known& k) {
  cudaFuncAttributes attributes{};
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel); error != cudaSuccess) return error;
  int bytes = 0;
  cudaError_t error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  bytes -= static_cast<int>(attributes.sharedSizeBytes);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  // The L1 cache gives way: a hint, which a driver may refuse.
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared) !=
      cudaSuccess) {
    (void)cudaGetLastError();
  }
  // The PTX's architecture is the __CUDA_ARCH__ of the code, whatever device the driver translated it for.
  k.has_clusters = std::min(attributes.ptxVersion, attributes.binaryVersion) >= 90;
  return cudaSuccess;
}

// With the mutex held; an error is not remembered.
cudaError_t find(const void* kernel, Known*& found) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::pair key(kernel, device);
  auto at = known.find(key);
  if (at == known.end()) {
    Known k{};
    if (const cudaError_t error = ask(kernel, device, k); error != cudaSuccess) return error;
    at = known.emplace(key, std::move(k)).first;
  }
  found = &at->second;
  return cudaSuccess;
}

cudaError_t ask_for_room(const void* kernel, const ClusterShape& c, int& clusters) {
  const auto bytes = static_cast<std::size_t>(c.shared_bytes);
  if (c.blocks == 1) return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&clusters, kernel, c.threads, bytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(c.blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(c.blocks));
  config.blockDim = dim3(static_cast<unsigned>(c.threads));
  config.dynamicSmemBytes = bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
}

}  // namespace

cudaError_t allow_shared_memory(const void* kernel) {
  const std::lock_guard<std::mutex> lock(mutex);
  Known* k = nullptr;
  return find(kernel, k);
}

bool can_launch(const void* kernel, const ClusterShape& cluster) {
  const std::lock_guard<std::mutex> lock(mutex);
  Known* k = nullptr;
  if (find(kernel, k) != cudaSuccess) {
    (void)cudaGetLastError();  // the path that is taken instead reports what is wrong with the device
    return false;
  }
  if (cluster.blocks > 1 && !k->has_clusters) return false;
  const std::pair key(cluster.blocks, cluster.shared_bytes);
  const auto found = k->can_launch.find(key);
  if (found != k->can_launch.end()) return found->second;
  int clusters = 0;
  if (ask_for_room(kernel, cluster, clusters) != cudaSuccess) {
    (void)cudaGetLastError();
    clusters = 0;
  }
  return k->can_launch.emplace(key, clusters > 0).first->second;
}

}  // namespace se_ext::cuda
