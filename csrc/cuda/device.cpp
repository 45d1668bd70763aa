#include "device.h"

#include <mutex>
#include <unordered_map>

namespace se_ext::cuda {
namespace {

Device ask(int index) {
  const auto attribute = [index](cudaDeviceAttr name) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, index));
    return value;
  };
  Device d{};
  d.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  d.l2_bytes = attribute(cudaDevAttrL2CacheSize);
  d.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  d.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  d.shared_reserved = attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  // Two transfers per clock; kHz and bits. A driver that doesn't tell costs the plan its precision, not the op.
  const auto told = [index](cudaDeviceAttr name) {
    int value = 0;
    if (cudaDeviceGetAttribute(&value, name, index) == cudaSuccess) return value;
    (void)cudaGetLastError();
    return 0;
  };
  constexpr double kUnknown = 1e6;  // 1 TB/s
  const double rate = 2.0 * told(cudaDevAttrMemoryClockRate) * told(cudaDevAttrGlobalMemoryBusWidth) / 8 / 1e3;
  d.bytes_per_us = rate > 0 ? rate : kUnknown;
  return d;
}

}  // namespace

const Device& current_device() {
  static std::mutex mutex;
  static std::unordered_map<int, Device> devices;  // references into it stay valid
  int index = 0;
  C10_CUDA_CHECK(cudaGetDevice(&index));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = devices.find(index);
  return found != devices.end() ? found->second : devices.emplace(index, ask(index)).first->second;
}

}  // namespace se_ext::cuda
