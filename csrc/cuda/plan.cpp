#include "plan.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <stdexcept>

#include "../info.h"
#include "tiling.h"

namespace se_ext {
namespace cuda {
namespace {

constexpr const char* kNames[] = {"auto", "cluster", "chunked", "whole"};
std::atomic<int> forced{0};
std::atomic<int> taken{0};  // 0: none yet

constexpr Cluster kNone{0, 0};

ClusterTask task_of(const Work& w) {
  return {*w.cluster_op, w.dtype, w.slab, w.hidden_channels, w.maps_read_twice};
}

bool can_launch(const ClusterTask& task, Cluster cluster) {
  return task.op == ClusterOp::Backward ? backward_can_launch(task, cluster) : forward_can_launch(task, cluster);
}

int most_blocks(const Work& w) {
  if (w.samples > INT32_MAX / 8) return 0;  // a grid has no more
  return static_cast<int>(std::min<std::int64_t>(8, divide_up(w.slab.channels, full_access(w.dtype))));
}

// How many blocks of the cluster a multiprocessor has room for.
int per_multiprocessor(const ClusterTask& task, Cluster cluster, const Device& d) {
  const std::int64_t bytes = ClusterLayout::of(task, cluster).bytes;
  if (bytes > d.shared_per_block) return 0;
  const int have_room = static_cast<int>(d.shared_per_multiprocessor / (bytes + d.shared_reserved));
  return std::min(most_per_multiprocessor(task.op, size_of(task.dtype)), have_room);
}

// The smallest cluster whose blocks fit twice on a multiprocessor, so that one loads while the other computes or
// writes; failing that, once; failing that, none. It is doubled while the whole batch leaves multiprocessors idle. The
// driver has the last word on every size.
Cluster cluster_of(const Work& w, const Device& d) {
  const ClusterTask task = task_of(w);
  const int most = most_blocks(w);
  const auto keeps_all = [&](int blocks) { return Cluster{blocks, ClusterLayout::of(task, {blocks, 0}).lines}; };
  const auto fits = [&](int blocks, int times) {
    return per_multiprocessor(task, keeps_all(blocks), d) >= times && can_launch(task, keeps_all(blocks));
  };
  for (const int times : {2, 1}) {
    for (int blocks = 1; blocks <= most; blocks *= 2) {
      if (!fits(blocks, times)) continue;
      while (2 * blocks <= most && w.samples * 2 * blocks <= d.multiprocessors &&
             can_launch(task, keeps_all(2 * blocks))) {
        blocks *= 2;
      }
      return keeps_all(blocks);
    }
  }
  return kNone;
}

// Of a slab that no cluster holds, as much as the largest one does: a block has a multiprocessor for itself.
Cluster cluster_of_part(const Work& w, const Device& d) {
  const ClusterTask task = task_of(w);
  const std::int64_t room = std::min(d.shared_per_block, d.shared_per_multiprocessor - d.shared_reserved);
  int blocks = 8;
  while (blocks > most_blocks(w)) blocks /= 2;
  for (; blocks > 0; blocks /= 2) {
    const Cluster part{blocks, cluster_keeps(task, blocks, room)};
    if (per_multiprocessor(task, part, d) > 0 && can_launch(task, part)) return part;
  }
  return kNone;
}

// What estimate() returns of paths that are not to be taken: more than any time.
constexpr double kNever = std::numeric_limits<double>::infinity();

std::int64_t slab_bytes(const Work& w) {
  return std::max<std::int64_t>(1, w.slab.channels * w.slab.points * size_of(w.dtype));
}

// Of a sample, what the cluster reads a second time.
double bytes_read_again(const Work& w, Cluster cluster) {
  const std::int64_t lines = ClusterLayout::of(task_of(w), cluster).lines;
  return static_cast<double>(slab_bytes(w) * w.maps_read_twice) * static_cast<double>(lines - cluster.kept) /
         static_cast<double>(lines);
}

// A part is worth keeping where there are clusters for all multiprocessors, and half of the L2 cache has room for what
// those that run at a time read again.
bool is_worth(const Work& w, const Device& d, Cluster part) {
  if (part.blocks == 0) return false;
  const std::int64_t at_a_time = std::max(1, d.multiprocessors / part.blocks);
  return w.samples >= at_a_time &&
         static_cast<double>(at_a_time) * bytes_read_again(w, part) <= static_cast<double>(d.l2_bytes) / 2;
}

// A third of L2 for what is read twice: the rest is for what is written, and for the other half of the chip, which may
// keep lines of its own.
std::int64_t chunk_of(const Work& w, const Device& d) {
  return std::max<std::int64_t>(1, d.l2_bytes / 3 / (slab_bytes(w) * w.maps_read_twice));
}

// whenever_possible: also where it is not worth it.
Cluster cluster_for(const Work& w, const Device& d, bool whenever_possible) {
  if (!w.cluster_op || w.samples == 0 || w.slab.points == 0) return kNone;
  const Cluster whole = cluster_of(w, d);
  if (whole.blocks > 0) return whole;
  const Cluster part = cluster_of_part(w, d);
  return whenever_possible || is_worth(w, d, part) ? part : kNone;
}

// Of the excitation in a cluster: two barriers, and two products that wait for the L2 cache.
constexpr double kExciteUs = 2;

// While it runs its cluster neither reads nor writes. Other clusters do where a multiprocessor has two blocks, once the
// first ones have begun.
double excitations_us(const Work& w, const Device& d, Cluster cluster) {
  if (per_multiprocessor(task_of(w), cluster, d) > 1) return kExciteUs;
  const std::int64_t at_a_time = std::max(1, d.multiprocessors / cluster.blocks);
  return kExciteUs * static_cast<double>(divide_up(w.samples, at_a_time));
}

// Far memory moves bytes_per_us, the L2 cache two and a half times as much; a launch costs 1.5, which small maps feel.
// S is the slab's bytes, W the weights', N the samples; 4 kernels:
//   Cluster   1.5 + N · S · (read twice + once) / far + N · W / L2             every sample reads the weights again
//             + N · (what is not kept of S · read twice) / L2 + excitations
//   Whole     6 + N · S · (2 · read twice + once) / far + (N / 4) · W / L2     the second reading from L2 if all fits
//   Chunked   6 per chunk + N · S · ((read twice + once) / far + read twice / L2) + …
// So Cluster gives way where the weights outweigh the slab (2 · C · M against C · P, the 7×7 stages), and Chunked is
// worth its launches where a chunk of L2's size takes longer to read again from far memory than four launches do.
// What this predicts for the stages of a ResNet-50 on an H200 is written down in docs/tuning.md.
Estimate estimate(const Work& w, const Device& d, Cluster cluster, std::int64_t chunk) {
  constexpr double kLaunch = 1.5, kKernels = 4, kL2Speed = 2.5, kSamplesPerWeight = 4;
  const double far = d.bytes_per_us, near = kL2Speed * far;
  const double maps = static_cast<double>(w.samples) * static_cast<double>(slab_bytes(w));
  const double weights = static_cast<double>(w.samples) * static_cast<double>(w.weight_bytes) / near;
  const double once = maps * (w.maps_read_twice + w.maps_once) / far;
  const bool stays = maps * (w.maps_read_twice + w.maps_once) <= static_cast<double>(d.l2_bytes) / 2;
  const double again = maps * w.maps_read_twice / (stays ? near : far);
  const double chunks = static_cast<double>(divide_up(w.samples, std::max<std::int64_t>(1, chunk)));
  Estimate e{kNever, kNever, kKernels * kLaunch + once + again + weights / kSamplesPerWeight};
  if (cluster.blocks > 0) {
    e.cluster_us = kLaunch + once + weights + static_cast<double>(w.samples) * bytes_read_again(w, cluster) / near +
                   excitations_us(w, d, cluster);
  }
  if (w.can_chunk && chunk < w.samples) {
    e.chunked_us = chunks * kKernels * kLaunch + once + maps * w.maps_read_twice / near + weights / kSamplesPerWeight;
  }
  return e;
}

Plan choose(const Work& w, const Estimate& e, Cluster cluster, std::int64_t chunk) {
  if (e.cluster_us < std::min(e.chunked_us, e.whole_us)) return {Path::Cluster, cluster, w.samples};
  return e.chunked_us < e.whole_us ? Plan{Path::Chunked, kNone, chunk} : Plan{Path::Whole, kNone, w.samples};
}

Plan plan_of(const Work& w, const Device& d) {
  const int force = forced.load(std::memory_order_relaxed);
  const Cluster cluster = cluster_for(w, d, /*whenever_possible=*/force == 1);
  const std::int64_t chunk = chunk_of(w, d);
  const std::int64_t small_chunk = std::max<std::int64_t>(1, std::min(chunk, w.samples / 3));
  const Plan whole{Path::Whole, kNone, w.samples};
  switch (force) {
    case 1:
      return cluster.blocks > 0 ? Plan{Path::Cluster, cluster, w.samples} : whole;
    case 2:
      return w.can_chunk ? Plan{Path::Chunked, kNone, small_chunk} : whole;
    case 3:
      return whole;
    default:
      return choose(w, estimate(w, d, cluster, chunk), cluster, chunk);
  }
}

}  // namespace

Plan Plan::of(const Work& w, const Device& d) {
  const Plan plan = plan_of(w, d);
  taken.store(1 + static_cast<int>(plan.path), std::memory_order_relaxed);
  return plan;
}

Estimate Estimate::of(const Work& w, const Device& d) {
  return estimate(w, d, cluster_for(w, d, /*whenever_possible=*/false), chunk_of(w, d));
}

}  // namespace cuda

void set_cuda_path(const std::string& path) {
  const auto* found = std::find(std::begin(cuda::kNames), std::end(cuda::kNames), path);
  if (found == std::end(cuda::kNames)) {
    throw std::invalid_argument("set_cuda_path: expected one of auto, cluster, chunked, whole, got \"" + path + "\"");
  }
  cuda::forced.store(static_cast<int>(found - std::begin(cuda::kNames)), std::memory_order_relaxed);
}

std::string last_cuda_path() {
  const int path = cuda::taken.load(std::memory_order_relaxed);
  return path == 0 ? "" : cuda::kNames[path];
}

std::string cuda_path() {
  return cuda::kNames[cuda::forced.load(std::memory_order_relaxed)];
}

}  // namespace se_ext
