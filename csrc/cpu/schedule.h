// How a batch is cut up: who works on which samples, and how many samples at a time stay in cache between the pass
// that reduces them and the pass that rewrites them.
#pragma once

#include <cstdint>

#include "feature_map.h"
#include "isa.h"
#include "parallel.h"

namespace se_ext::cpu {

struct Schedule {
  int threads;
  bool by_sample;      // each thread has its own samples and never waits; else all work on the same block
  std::int64_t block;  // samples per block

  // maps: how many full-size tensors a block touches. weight_bytes: what is read again for every block.
  static Schedule of(const FeatureMap& map, int maps, std::int64_t weight_bytes);

  int teams() const { return by_sample ? threads : 1; }

  // body(team, index of the team, first sample, samples) for every block.
  template <class F>
  void run(std::int64_t samples, const F& body) const {
    parallel(threads, [&](Team all) {
      const Team team = by_sample ? Team{} : all;
      const auto [begin, end] = by_sample ? all.share(samples) : std::pair<std::int64_t, std::int64_t>{0, samples};
      for (std::int64_t n = begin; n < end; n += block) {
        body(team, by_sample ? all.rank : 0, n, std::min(block, end - n));
      }
    });
  }
};

// The two passes of a team over a block of samples, tile by tile. Both give a thread the same tiles, so that what it
// read first is what its own cache holds.
class Tiles {
 public:
  Tiles(const FeatureMap& map, const Schedule& schedule, at::ScalarType accumulate)
      : tiling_(map),
        channels_(map.slab.channels),
        partial_per_team_(map.slab.layout == Layout::ChannelsLast ? schedule.block * tiling_.count * channels_ : 0),
        partials_(at::empty({partial_per_team_ * schedule.teams()}, map.tensor.options().dtype(accumulate))),
        partial_(partials_),
        vector_(accumulate == at::kDouble ? kernels().vector_double : kernels().vector_float) {}

  // out[n, c] = (Σ over tiles of what reduce(n, tile, sums) sums up) / divisor. Ends with a barrier.
  template <class F>
  void reduce(Team team, int index, std::int64_t first, std::int64_t samples, std::int64_t divisor, Pointer out,
              const F& reduce) const {
    const bool whole_channels = partial_per_team_ == 0;
    const Pointer partial = offset(partial_, index * partial_per_team_);
    const auto [begin, end] = team.share(samples * tiling_.count);
    for (std::int64_t u = begin; u < end; ++u) {
      const std::int64_t n = first + u / tiling_.count;
      reduce(n, tiling_.tile(u % tiling_.count), whole_channels ? out.at(n * channels_) : partial.at(u * channels_));
    }
    team.barrier();
    const auto [n0, n1] = team.share(samples);
    const std::int64_t tiles = whole_channels ? 1 : tiling_.count;
    for (std::int64_t n = n0; n < n1; ++n) {
      char* z = out.at((first + n) * channels_);
      vector_.combine_tiles(tiles, channels_, divisor, whole_channels ? z : partial.at(n * tiles * channels_), z);
    }
    team.barrier();
  }

  // apply(n, tile) for every tile of the block.
  template <class F>
  void apply(Team team, std::int64_t first, std::int64_t samples, const F& apply) const {
    const auto [begin, end] = team.share(samples * tiling_.count);
    for (std::int64_t u = begin; u < end; ++u) apply(first + u / tiling_.count, tiling_.tile(u % tiling_.count));
  }

 private:
  static Pointer offset(Pointer p, std::int64_t items) {
    p.base += items * p.item_bytes;
    return p;
  }

  Tiling tiling_;
  std::int64_t channels_;
  std::int64_t partial_per_team_;  // ChannelsLast: one row of partial sums per tile of a block
  at::Tensor partials_;
  Pointer partial_;
  const VectorKernels& vector_;
};

}  // namespace se_ext::cpu
