// Which way an op goes over its map.
#pragma once

#include <optional>

#include "../params.h"
#include "device.h"
#include "launch.h"

namespace se_ext::cuda {

// Cluster: one kernel, each sample's maps on chip from the pass that sums to the pass that writes, or what has room.
// Chunked: both passes, and the excitation between them, on a few samples at a time, so that the second pass finds them
// in the L2 cache.
// Whole: the same on the whole batch.
enum class Path : std::uint8_t { Cluster, Chunked, Whole };

struct Work {
  DType dtype;
  Slab slab;
  std::int64_t samples;
  int maps_read_twice;                                 // by the reduction and by the pass that writes
  int maps_once;                                       // read or written by the latter alone
  std::int64_t hidden_channels;                        // of the excitation
  std::int64_t weight_bytes;                           // of both layers
  std::optional<ClusterOp> cluster_op = std::nullopt;  // the op has such a kernel
  bool can_chunk = true;                               // what a sample gets does not depend on the others
};

// What the paths are expected to take; infinity for a path that the work cannot take.
struct Estimate {
  double cluster_us, chunked_us, whole_us;

  static Estimate of(const Work& work, const Device& device);
};

struct Plan {
  Path path;
  Cluster cluster;     // where path is Cluster
  std::int64_t chunk;  // samples at a time; all of them where path is Whole

  // Its path is what se_ext::last_cuda_path() names from here on.
  static Plan of(const Work& work, const Device& device);
};

}  // namespace se_ext::cuda
