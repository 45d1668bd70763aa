// The API's side of the stand-in: attributes, errors, and what a launch may ask for.
#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "launch.h"

namespace {

using cuda_host::Launch;

struct Kernel {
  int shared_bytes = 48 << 10;
  bool large_clusters = false;
};

std::mutex mutex;  // over all that follows, and over the launch under way
std::map<const void*, Kernel> kernels;
std::uint64_t largest_cluster = 0;
int ptx = 0, room = 0;  // see cuda_host_set_ptx, cuda_host_set_room
int limits_set = 0, limits_lowered = 0;
std::map<int, int> attributes = {// an H200's
                                 {cudaDevAttrMultiProcessorCount, 132},
                                 {cudaDevAttrMemoryClockRate, 3201000},  // kHz
                                 {cudaDevAttrGlobalMemoryBusWidth, 6144},
                                 {cudaDevAttrL2CacheSize, 60 << 20},
                                 {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
                                 {cudaDevAttrComputeCapabilityMajor, 9},
                                 {cudaDevAttrComputeCapabilityMinor, 0},
                                 {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472},
                                 {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
                                 {cudaDevAttrReservedSharedMemoryPerBlock, 1024}};

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

bool within(dim3 d, unsigned x, unsigned y, unsigned z) {
  return d.x >= 1 && d.x <= x && d.y >= 1 && d.y <= y && d.z >= 1 && d.z <= z;
}

std::uint64_t count(dim3 d) {
  return std::uint64_t{d.x} * d.y * d.z;
}

int capability() {
  return 10 * attributes[cudaDevAttrComputeCapabilityMajor] + attributes[cudaDevAttrComputeCapabilityMinor];
}

bool knows_clusters() {
  return std::min(ptx != 0 ? ptx : capability(), capability()) >= 90;
}

// As the driver's; 0 where the limit of the kernel's shared memory is lower.
int blocks_per_multiprocessor(const void* kernel, std::uint64_t threads, std::size_t bytes) {
  if (threads == 0 || bytes > static_cast<std::size_t>(kernels[kernel].shared_bytes)) return 0;
  const auto all = static_cast<std::size_t>(attributes[cudaDevAttrMaxSharedMemoryPerMultiprocessor]);
  const std::size_t each = bytes + static_cast<std::size_t>(attributes[cudaDevAttrReservedSharedMemoryPerBlock]);
  const std::size_t by_threads = static_cast<std::size_t>(attributes[cudaDevAttrMaxThreadsPerMultiProcessor]) / threads;
  return static_cast<int>(each == 0 ? by_threads : std::min(by_threads, all / each));
}

Launch launch_of(const cudaLaunchConfig_t& config, const void* kernel, bool* clusters = nullptr) {
  Launch l{config.gridDim, config.blockDim, {1, 1, 1}, config.dynamicSmemBytes, kernel, nullptr, nullptr, true};
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension) continue;
    const auto& size = config.attrs[i].val.clusterDim;
    l.cluster = dim3(size.x, size.y, size.z);
    if (clusters != nullptr) *clusters = true;
  }
  return l;
}

cudaError_t check(const Launch& l, bool clusters) {
  const Kernel& kernel = kernels[l.kernel];
  if (!within(l.grid, 0x7fffffff, 65535, 65535)) return cudaErrorInvalidConfiguration;
  if (!within(l.block, 1024, 1024, 64) || count(l.block) > 1024) return cudaErrorInvalidConfiguration;
  if (l.shared_bytes > static_cast<std::size_t>(kernel.shared_bytes)) return cudaErrorInvalidValue;
  if (!clusters) return cudaSuccess;
  if (attributes[cudaDevAttrComputeCapabilityMajor] < 9) return cudaErrorNotSupported;
  if (room > 0 && count(l.cluster) > static_cast<unsigned>(room)) return cudaErrorInvalidClusterSize;
  const unsigned largest = kernel.large_clusters ? 16 : 8;
  if (!within(l.cluster, largest, largest, largest) || count(l.cluster) > largest) return cudaErrorInvalidClusterSize;
  if (l.grid.x % l.cluster.x != 0 || l.grid.y % l.cluster.y != 0 || l.grid.z % l.cluster.z != 0) {
    return cudaErrorInvalidClusterSize;
  }
  return cudaSuccess;
}

}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle:
      return "not inside a device guard, or not on its current stream";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorInvalidClusterSize:
      return "cluster misconfiguration";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() {
  return std::exchange(last_error, cudaSuccess);
}

cudaError_t cudaPeekAtLastError() {
  return last_error;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const std::lock_guard lock(mutex);
  const auto found = attributes.find(attribute);
  if (device != 0) return result(cudaErrorInvalidDevice);
  if (found == attributes.end()) return result(cudaErrorInvalidValue);
  *value = found->second;
  return cudaSuccess;
}

void cuda_host_set_attribute(int attribute, int value) {
  const std::lock_guard lock(mutex);
  attributes[attribute] = value;
}

void cuda_host_set_ptx(int architecture) {
  const std::lock_guard lock(mutex);
  ptx = architecture;
}

void cuda_host_set_room(int blocks) {
  const std::lock_guard lock(mutex);
  room = blocks;
}

void cuda_host_limits(int* set, int* lowered) {
  const std::lock_guard lock(mutex);
  *set = std::exchange(limits_set, 0);
  *lowered = std::exchange(limits_lowered, 0);
}

int cuda_host_largest_cluster() {
  const std::lock_guard lock(mutex);
  return static_cast<int>(std::exchange(largest_cluster, 0));
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard lock(mutex);
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || value > attributes[cudaDevAttrMaxSharedMemoryPerBlockOptin]) break;
      ++limits_set;
      limits_lowered += value < kernels[kernel].shared_bytes;
      kernels[kernel].shared_bytes = value;
      return cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout:
      if (value < -1 || value > 100) break;
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      kernels[kernel].large_clusters = value != 0;
      return cudaSuccess;
  }
  return result(cudaErrorInvalidValue);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void*) {
  const std::lock_guard lock(mutex);
  *out = {0, ptx != 0 ? ptx : capability(), capability()};
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads,
                                                          std::size_t dynamic_bytes) {
  const std::lock_guard lock(mutex);
  *blocks = blocks_per_multiprocessor(kernel, static_cast<std::uint64_t>(threads), dynamic_bytes);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config) {
  const std::lock_guard lock(mutex);
  if (capability() < 90) return result(cudaErrorNotSupported);
  const Launch l = launch_of(*config, kernel);
  const std::uint64_t size = count(l.cluster);
  const auto blocks = static_cast<std::uint64_t>(blocks_per_multiprocessor(kernel, count(l.block), l.shared_bytes));
  const bool has_room = size <= (kernels[kernel].large_clusters ? 16 : 8) && (room == 0 || size <= std::uint64_t(room));
  const auto multiprocessors = static_cast<std::uint64_t>(attributes[cudaDevAttrMultiProcessorCount]);
  *clusters = has_room ? static_cast<int>(blocks * multiprocessors / size) : 0;
  return cudaSuccess;
}

namespace cuda_host {

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* arguments) {
  bool clusters = false;
  Launch l = launch_of(config, kernel, &clusters);
  l.body = body;
  l.arguments = arguments;
  const std::lock_guard lock(mutex);
  l.knows_clusters = knows_clusters();
  largest_cluster = std::max(largest_cluster, count(l.cluster));
  const bool is_placed = !has_guards || (guards > 0 && config.stream == kStream);
  const cudaError_t error = is_placed ? check(l, clusters) : cudaErrorInvalidResourceHandle;
  if (error == cudaSuccess) run(l);
  return result(error);
}

}  // namespace cuda_host
