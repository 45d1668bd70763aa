#include "plan.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "../info.h"
#include "launch.h"
#include "tiling.h"

namespace se_ext {
namespace cuda {
namespace {

constexpr const char* kNames[] = {"auto", "cluster", "chunked", "whole"};
std::atomic<int> forced{0};

// The smallest cluster whose blocks fit twice on a multiprocessor, so that one loads while the other computes or
// writes; failing that, once; failing that, 0. It is doubled while the whole batch leaves multiprocessors idle.
int cluster_of(const Work& w, const Device& d) {
  const std::int64_t shares = divide_up(w.slab.channels, full_access(w.dtype));
  if (w.samples > INT32_MAX / 8) return 0;  // a grid has no more blocks
  const int most = d.capability >= 90 ? static_cast<int>(std::min<std::int64_t>(8, shares)) : 1;
  const auto fits = [&](int cluster, int per_multiprocessor) {
    const std::int64_t bytes = cluster_shared_bytes(w.dtype, w.slab, w.hidden_channels, cluster);
    return bytes <= d.shared_per_block &&
           per_multiprocessor * (bytes + d.shared_reserved) <= d.shared_per_multiprocessor;
  };
  for (const int per_multiprocessor : {2, 1}) {
    for (int cluster = 1; cluster <= most; cluster *= 2) {
      if (!fits(cluster, per_multiprocessor)) continue;
      while (2 * cluster <= most && w.samples * 2 * cluster <= d.multiprocessors) cluster *= 2;
      return cluster;
    }
  }
  return 0;
}

// Estimates in µs, of which only the order counts. Far memory moves bytes_per_us, the L2 cache two and a half times as
// much; a launch costs 1.5, which small maps feel. S is the slab's bytes, W the weights', N the samples; 4 kernels:
//   Cluster   1.5 + N · S · (read twice + once) / far + N · W / L2             every sample reads the weights again
//   Whole     6 + N · S · (2 · read twice + once) / far + (N / 4) · W / L2     the second reading from L2 if all fits
//   Chunked   6 per chunk + N · S · ((read twice + once) / far + read twice / L2) + …
// So Cluster gives way where the weights outweigh the slab (2 · C · M against C · P, the 7×7 stages), and Chunked is
// worth its launches where a chunk of L2's size takes longer to read again from far memory than four launches do.
Plan choose(const Work& w, const Device& d, int cluster, std::int64_t chunk) {
  constexpr double kLaunch = 1.5, kKernels = 4, kL2Speed = 2.5, kSamplesPerWeight = 4;
  const double far = d.bytes_per_us, near = kL2Speed * far;
  const double slab = static_cast<double>(w.slab.channels) * static_cast<double>(w.slab.points) * size_of(w.dtype);
  const double maps = static_cast<double>(w.samples) * slab;
  const double weights = static_cast<double>(w.samples) * static_cast<double>(w.weight_bytes) / near;
  const double once = maps * (w.maps_read_twice + w.maps_once) / far;
  const bool stays = maps * (w.maps_read_twice + w.maps_once) <= static_cast<double>(d.l2_bytes) / 2;
  const double again = maps * w.maps_read_twice / (stays ? near : far);
  const double chunks = static_cast<double>(divide_up(w.samples, std::max<std::int64_t>(1, chunk)));

  Plan best{Path::Whole, 0, w.samples};
  double least = kKernels * kLaunch + once + again + weights / kSamplesPerWeight;
  if (cluster > 0) {
    const double time = kLaunch + once + weights;
    if (time < least) best = {Path::Cluster, cluster, w.samples}, least = time;
  }
  if (chunk < w.samples) {
    const double time =
        chunks * kKernels * kLaunch + once + maps * w.maps_read_twice / near + weights / kSamplesPerWeight;
    if (time < least) best = {Path::Chunked, 0, chunk};
  }
  return best;
}

}  // namespace

Plan Plan::of(const Work& w, const Device& d) {
  const int cluster = w.can_cluster && w.samples > 0 && w.slab.points > 0 ? cluster_of(w, d) : 0;
  // A third of L2 for what is read twice: the rest is for what is written, and for the other half of the chip, which
  // may keep lines of its own.
  const std::int64_t slab_bytes = std::max<std::int64_t>(1, w.slab.channels * w.slab.points * size_of(w.dtype));
  const std::int64_t chunk = std::max<std::int64_t>(1, d.l2_bytes / 3 / (slab_bytes * w.maps_read_twice));
  const std::int64_t small_chunk = std::max<std::int64_t>(1, std::min(chunk, w.samples / 3));
  const Plan whole{Path::Whole, 0, w.samples};
  switch (forced.load(std::memory_order_relaxed)) {
    case 1:
      return cluster > 0 ? Plan{Path::Cluster, cluster, w.samples} : whole;
    case 2:
      return {Path::Chunked, 0, small_chunk};
    case 3:
      return whole;
    default:
      return choose(w, d, cluster, chunk);
  }
}

}  // namespace cuda

void set_cuda_path(const std::string& path) {
  const auto* found = std::find(std::begin(cuda::kNames), std::end(cuda::kNames), path);
  if (found == std::end(cuda::kNames)) {
    throw std::invalid_argument("set_cuda_path: expected one of auto, cluster, chunked, whole, got \"" + path + "\"");
  }
  cuda::forced.store(static_cast<int>(found - std::begin(cuda::kNames)), std::memory_order_relaxed);
}

std::string cuda_path() {
  return cuda::kNames[cuda::forced.load(std::memory_order_relaxed)];
}

}  // namespace se_ext
