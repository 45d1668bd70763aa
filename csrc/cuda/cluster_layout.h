// How the thread blocks of a cluster share out a sample, and what lies where in the shared memory of each.
#pragma once

#include "tiling.h"

namespace se_ext::cuda {

// What a cluster's kernel computes.
enum class ClusterOp : std::uint8_t { Forward, ForwardBehindPrologue, Backward };

// The blocks of its kernel that a multiprocessor has registers for; on maps of so many bytes per value.
constexpr int most_per_multiprocessor(ClusterOp op, int value_bytes) {
  return op == ClusterOp::Backward && value_bytes == 8 ? 1 : 2;
}

struct ClusterTask {
  ClusterOp op;
  DType dtype;
  Slab slab;
  std::int64_t hidden_channels;
  int maps;  // that both passes read: these are kept
};

// The blocks that work on a sample, and how many lines of its share each of them keeps in shared memory: channels, in
// ChannelsLast tiles of points. It reads the others again.
struct Cluster {
  int blocks;  // 0: no cluster
  std::int64_t kept;
};

struct ClusterLayout {
  std::int64_t unit, hidden_unit;  // the blocks share out the channels, and the hidden ones, in units of so many
  std::int64_t lines;              // of a share; of the largest, where they differ
  std::int64_t step;               // lines that are kept, unless all are: a multiple of so many
  std::int64_t stage;              // lines that are copied and then summed at a time
  BandLayout bands;                // ChannelsLast: over a block's share

  // In shared memory, in bytes from its start, the same in every block: the kept lines of each map, one map after the
  // other; two vectors of all channels and one of the hidden channels; what sums are combined in.
  std::int64_t map_bytes;
  std::int64_t channels_at, second_channels_at, hidden_at, scratch_at;
  std::int64_t bytes;

  static ClusterLayout of(const ClusterTask& task, Cluster cluster);
};

// As many lines as have room in so much shared memory of each block.
std::int64_t cluster_keeps(const ClusterTask& task, int blocks, std::int64_t shared_bytes);

}  // namespace se_ext::cuda
