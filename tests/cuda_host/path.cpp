// For Python, which reaches this library through ctypes.
#include "../../csrc/cuda/plan.h"
#include "../../csrc/info.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void cuda_host_set_path(const char* path) {
  se_ext::set_cuda_path(path);
}

// The path that an inference would take: 0 cluster, 1 chunked, 2 whole.
EXPORTED int cuda_host_plan(bool is_half, bool is_last, long channels, long points, long samples, long hidden) {
  using namespace se_ext;
  const DType type = is_half ? DType::BFloat16 : DType::Float32;
  const Slab slab{channels, points, is_last ? Layout::ChannelsLast : Layout::ChannelsFirst};
  const long weight_bytes = 2 * channels * hidden * (is_half ? 2 : 4);
  const cuda::Work work{type, slab, samples, 1, 1, hidden, weight_bytes, true};
  return static_cast<int>(cuda::Plan::of(work, cuda::current_device()).path);
}
