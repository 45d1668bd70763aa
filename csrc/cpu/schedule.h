// How a batch is cut up: who works on which samples, and how many samples at a time stay in cache between the pass
// that reduces them and the pass that rewrites them.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"
#include "parallel.h"
#include "tiling.h"

namespace se_ext::cpu {

struct Schedule {
  int threads;
  bool by_sample;      // each thread has its own samples and never waits; else all work on the same chunk
  std::int64_t chunk;  // samples at a time
  bool streaming;      // all maps together exceed the last cache: the next op would miss it anyway

  // maps: how many full-size tensors a chunk touches. weight_bytes: what is read again for every chunk.
  static Schedule of(const FeatureMap& map, int maps, std::int64_t weight_bytes);
  // Without a map: all samples at once, `bytes` of traffic.
  static Schedule of(std::int64_t samples, std::int64_t bytes);

  int teams() const { return by_sample ? threads : 1; }

  // body(team, index of the team, first sample, samples) for every chunk.
  template <class F>
  void run(std::int64_t samples, const F& body) const {
    for_each_chunk(samples, false, body);
  }
  // The same from the last chunk to the first: for a second pass over the batch, which finds the end of the first one
  // in cache.
  template <class F>
  void run_backwards(std::int64_t samples, const F& body) const {
    for_each_chunk(samples, true, body);
  }

 private:
  template <class F>
  void for_each_chunk(std::int64_t samples, bool backwards, const F& body) const {
    parallel(threads, [&](Team all) {
      const Team team = by_sample ? Team{} : all;
      const auto [begin, end] = by_sample ? all.share(samples) : std::pair<std::int64_t, std::int64_t>{0, samples};
      const std::int64_t chunks = ceil_div(end - begin, chunk);
      for (std::int64_t i = 0; i < chunks; ++i) {
        const std::int64_t n = begin + (backwards ? chunks - 1 - i : i) * chunk;
        body(team, by_sample ? all.rank : 0, n, std::min(chunk, end - n));
      }
    });
  }
};

// A pass of a team over a chunk of samples, tile by tile. Every pass gives a thread the same tiles, so that what it
// read first is what its own cache holds.
class Tiles {
 public:
  explicit Tiles(const FeatureMap& map) : tiling_(map) {}

  // apply(n, tile) for every tile of the chunk.
  template <class F>
  void apply(Team team, std::int64_t first, std::int64_t samples, const F& apply) const {
    for_each_tile(team, samples, [&](std::int64_t n, std::int64_t t) { apply(first + n, tiling_.tile(t)); });
  }

 protected:
  template <class F>
  static void for_each(Team team, std::int64_t count, const F& f) {
    const auto [begin, end] = team.share(count);
    for (std::int64_t i = begin; i < end; ++i) f(i);
  }

  template <class F>
  void for_each_tile(Team team, std::int64_t samples, const F& f) const {
    for_each(team, samples * tiling_.count, [&](std::int64_t u) { f(u / tiling_.count, u % tiling_.count); });
  }

  Tiling tiling_;
};

// The pass that reduces a slab to `parts` values per channel, [parts, C]. In ChannelsLast it needs scratch memory for
// partial sums.
class Reduction : public Tiles {
 public:
  Reduction(const FeatureMap& map, const Schedule& schedule, int parts = 1)
      : Tiles(map),
        values_(parts * map.slab.channels),
        whole_channels_(map.slab.layout == Layout::ChannelsFirst),
        rows_per_team_(whole_channels_ ? 0 : (schedule.by_sample ? 1 : schedule.chunk * tiling_.count)),
        teams_(schedule.teams()),
        vector_(map.accumulation_type() == at::kDouble ? kernels().vector_double : kernels().vector_float) {}

  std::int64_t scratch_items() const { return rows_per_team_ * teams_ * values_; }
  void use(Pointer scratch) { partial_ = scratch; }

  // out[n, :] = (Σ over tiles of what reduce(n, tile, sums) sums up) / divisor. Ends with a barrier.
  // ChannelsFirst: a tile has its channels to itself. ChannelsLast: a tile sums up a row of partial sums, and the rows
  // are added in the tiles' order, one by one as they come (a team of one) or when all are there.
  template <class F>
  void reduce(Team team, int index, std::int64_t first, std::int64_t samples, std::int64_t divisor, Pointer out,
              const F& reduce) const {
    const std::int64_t tiles = tiling_.count;
    const auto row = [&](std::int64_t i) { return partial_.at((index * rows_per_team_ + i) * values_); };
    const auto sample = [&](std::int64_t n) { return out.at((first + n) * values_); };
    if (whole_channels_) {
      for_each_tile(team, samples,
                    [&](std::int64_t n, std::int64_t t) { reduce(first + n, tiling_.tile(t), sample(n)); });
      team.barrier();
      for_each(team, samples, [&](std::int64_t n) { vector_.divide(values_, divisor, sample(n)); });
    } else if (team.size == 1) {
      for (std::int64_t n = 0; n < samples; ++n) {
        std::memset(sample(n), 0, values_ * out.item_bytes);
        for (std::int64_t t = 0; t < tiles; ++t) {
          reduce(first + n, tiling_.tile(t), row(0));
          vector_.add_rows(1, values_, row(0), sample(n));
        }
        vector_.divide(values_, divisor, sample(n));
      }
    } else {
      for_each_tile(team, samples,
                    [&](std::int64_t n, std::int64_t t) { reduce(first + n, tiling_.tile(t), row(n * tiles + t)); });
      team.barrier();
      for_each(team, samples, [&](std::int64_t n) {
        std::memset(sample(n), 0, values_ * out.item_bytes);
        vector_.add_rows(tiles, values_, row(n * tiles), sample(n));
        vector_.divide(values_, divisor, sample(n));
      });
    }
    team.barrier();
  }

 private:
  std::int64_t values_;  // per sample
  bool whole_channels_;
  std::int64_t rows_per_team_;  // of partial sums, ChannelsLast
  int teams_;
  Pointer partial_;
  const VectorKernels& vector_;
};

}  // namespace se_ext::cpu
