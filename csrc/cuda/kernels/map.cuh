// The kernels over the map, for any visitor, and the choice among them.
#pragma once

#include "../launch.h"
#include "launching.cuh"
#include "visitors.cuh"

namespace se_ext::cuda {

// What the blocks share among them: items of work, taken in order or backwards.
struct Work {
  Tiling tiling;
  std::int64_t channels, points;
  std::int64_t first_sample;
  std::int64_t items;
  std::int64_t extent;  // of what an item writes, in accesses or points
  Divider by_tiles, by_next;
};

// ---- sums: [N, tiles, parts, C] ----

template <class Visitor>
SE_EXT_DEVICE std::int64_t sum_index(const Work& w, std::int64_t sample, std::int64_t tile, int part,
                                     std::int64_t channel) {
  return ((sample * w.tiling.tiles + tile) * Visitor::kParts + part) * w.channels + channel;
}

// Of a kernel that sums rows, per multiprocessor: kRowBlocks at a time where accesses are narrow. A launch has three
// times as many, so that the last round is full too where one, two or three find room at a time. Each takes many rows
// in turn: what a thread works out at its start is then little beside the rows.
constexpr int kRowBlocks = 4;

// How the rows are shared out: a block sums a tile of `per_block` rows, or of a multiple of it, at a time, and goes on
// `step` rows further.
struct RowWork {
  int per_block;
  std::int64_t rows, step;
  std::int64_t sample_step, channel_step;  // the same, as samples and channels
};

template <int n, class Visitor>
__global__ void __launch_bounds__(kThreads, kIsNarrow<Visitor, n>&& Visitor::kMaps == 1 ? kRowBlocks : Visitor::kBlocks)
    sum_rows(Visitor visitor, Work w, RowWork by, acc_t<typename Visitor::value_type>* out,
             acc_t<typename Visitor::value_type> divisor) {
  constexpr int kRows = kRowsAtOnce<Visitor, n>;
  const int lane = static_cast<int>(threadIdx.x) & (w.tiling.lanes - 1);
  const int mine = static_cast<int>(threadIdx.x) * by.per_block / kThreads;
  const auto [group, tile] = w.by_tiles(blockIdx.x);
  const std::int64_t begin = tile * w.tiling.extent, left = w.points / n - begin;
  const int accesses = static_cast<int>(left < w.tiling.extent ? left : w.tiling.extent);
  Lanes<Visitor, kRows> of_row;
  Lanes<Divider::Result, kRows> place;  // sample and channel
  std::int64_t start = group * by.per_block * kRows + mine;
  SE_EXT_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const std::int64_t row = start + r * by.per_block;
    place[r] = w.by_next(row);
    of_row[r] = visitor;
    of_row[r].begin_at((w.first_sample * w.channels + row) * w.points + (begin + lane) * n);
  }
  for (; start - mine < by.rows; start += by.step) {
    Lanes<decltype(visitor.template prepare<n>(0, Same{0})), kRows> prepared;
    SE_EXT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const std::int64_t beyond = start + r * by.per_block - (by.rows - 1);
      if (beyond > 0) {  // the last row stands in
        of_row[r].begin_at(-beyond * w.points);
        place[r] = w.by_next(by.rows - 1);
      }
      prepared[r] = visitor.template prepare<n>(w.first_sample + place[r].quotient, Same{place[r].remainder});
    }
    Lanes<Accumulators<Visitor, 1>, kRows> sums;
    sum_rows_at_once<n>(of_row, prepared, accesses, w.tiling.lanes, sums);
    SE_EXT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const std::int64_t row = start + r * by.per_block;
      const auto [sample, channel] = place[r];
      if (lane == 0 && row < by.rows) {
        // Where a row has one tile and one sum, sum_index counts rows.
        std::int64_t to = w.first_sample * w.channels + row;
        if (Visitor::kParts > 1 || w.tiling.tiles > 1)
          to = sum_index<Visitor>(w, w.first_sample + sample, tile, 0, channel);
        SE_EXT_UNROLL
        for (int k = 0; k < Visitor::kParts; ++k) out[to + k * w.channels] = sums[r].part[k][0] / divisor;
      }
      of_row[r].begin_at(by.step * w.points);
      place[r] = {sample + by.sample_step, channel + by.channel_step};
      if (place[r].remainder >= w.channels) place[r] = {place[r].quotient + 1, place[r].remainder - w.channels};
    }
  }
}

template <int n, class Visitor>
__global__ void __launch_bounds__(kThreads, Visitor::kBlocks)
    sum_bands(Visitor visitor, Work w, acc_t<typename Visitor::value_type>* out,
              acc_t<typename Visitor::value_type> divisor) {
  using A = acc_t<typename Visitor::value_type>;
  for (std::int64_t item = blockIdx.x; item < w.items; item += gridDim.x) {
    const auto place = w.by_tiles(item);
    const std::int64_t tile = place.remainder;
    const auto [sample, band] = w.by_next(place.quotient);
    const std::int64_t in_batch = w.first_sample + sample;
    const std::int64_t first_channel = band * w.tiling.width * n, base = in_batch * w.points;
    sum_band<n>(
        visitor, in_batch, first_channel, w.channels, tile, w.tiling, whole_band(w.tiling), w.points,
        reinterpret_cast<A*>(dynamic_shared()),
        [=, channels = w.channels](std::int64_t point, std::int64_t channel) {
          return (base + point) * channels + channel;
        },
        [&](int part, int, std::int64_t channel, A sum) {
          out[sum_index<Visitor>(w, in_batch, tile, part, channel)] = sum / divisor;
        });
  }
}

// The tiles' sums of one part of one channel, in order: what every path does after its tiles.
template <class A, class Tile>
SE_EXT_DEVICE A sum_tiles(std::int64_t tiles, const Tile& of_tile) {
  A sum = of_tile(0);
  for (std::int64_t t = 1; t < tiles; ++t) sum += of_tile(t);
  return sum;
}

// partials [samples, tiles, parts · C] → sums [samples, parts · C]
template <class A>
__global__ void __launch_bounds__(kThreads, 1)
    finish_sums(const A* partials, A* sums, Divider by_columns, std::int64_t tiles, std::int64_t items, A divisor) {
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < items;
       i += static_cast<std::int64_t>(gridDim.x) * kThreads) {
    const auto [sample, column] = by_columns(i);
    const A* first = partials + sample * tiles * by_columns.divisor + column;
    sums[i] = sum_tiles<A>(tiles, [&](std::int64_t t) { return first[t * by_columns.divisor]; }) / divisor;
  }
}

// ---- writes: from the last item to the first, because the sums' pass left the last ones in cache ----

constexpr int kWriteBlocks = 2;  // per multiprocessor, at least: one alone would leave memory idle while it computes

template <int n, class Visitor>
__global__ void __launch_bounds__(kThreads, kWriteBlocks) write_rows(Visitor visitor, Work w) {
  const int per_block = kThreads / w.tiling.lanes;
  for (std::int64_t start = static_cast<std::int64_t>(blockIdx.x) * per_block; start < w.items;
       start += static_cast<std::int64_t>(gridDim.x) * per_block) {
    const std::int64_t item = start + static_cast<int>(threadIdx.x) / w.tiling.lanes;
    if (item >= w.items) return;
    const auto [row, tile] = w.by_tiles(w.items - 1 - item);
    const auto [sample, channel] = w.by_next(row);
    const std::int64_t in_batch = w.first_sample + sample;
    const std::int64_t row_in_batch = in_batch * w.channels + channel;
    write_row<n>(visitor, in_batch, channel, row_in_batch, row_in_batch, tile, w.tiling, w.points / n);
  }
}

template <int n, class Visitor>
__global__ void __launch_bounds__(kThreads, kWriteBlocks) write_linear(Visitor visitor, Work w) {
  const std::int64_t accesses = w.channels * w.points / n;
  for (std::int64_t item = blockIdx.x; item < w.items; item += gridDim.x) {
    const auto [sample, chunk] = w.by_tiles(w.items - 1 - item);
    const std::int64_t begin = chunk * w.extent;
    const std::int64_t end = begin + w.extent < accesses ? begin + w.extent : accesses;
    const std::int64_t in_batch = w.first_sample + sample;
    write_across_rows<n>(visitor, in_batch, in_batch * w.channels * w.points, begin, end, threadIdx.x, kThreads,
                         w.channels, w.by_next);
  }
}

template <int n, class Visitor>
__global__ void __launch_bounds__(kThreads, kWriteBlocks) write_bands(Visitor visitor, Work w) {
  for (std::int64_t item = blockIdx.x; item < w.items; item += gridDim.x) {
    const auto place = w.by_tiles(w.items - 1 - item);
    const auto [sample, band] = w.by_next(place.quotient);
    const std::int64_t begin = place.remainder * w.extent;
    const std::int64_t end = begin + w.extent < w.points ? begin + w.extent : w.points;
    const std::int64_t in_batch = w.first_sample + sample, base = in_batch * w.points;
    write_band<n>(visitor, in_batch, band * w.tiling.width * n, w.channels, begin, end, whole_band(w.tiling),
                  w.channels, w.points, [=, channels = w.channels](std::int64_t point, std::int64_t channel) {
                    return (base + point) * channels + channel;
                  });
  }
}

// ---- launches ----

// f.template operator()<n>() with the access of the sums as a constant: full, 8 bytes of half types, one value.
template <class T, class F>
auto with_access(int access, const F& f) {
  if (access == kFull<T>) return f.template operator()<kFull<T>>();
  if constexpr (kIsHalf<T>) {
    if (access == 4) return f.template operator()<4>();
  }
  return f.template operator()<1>();
}

template <class Visitor>
cudaError_t launch_sums(const Batch& batch, const Visitor& visitor, const Sums& sums) {
  using T = typename Visitor::value_type;
  using A = acc_t<T>;
  constexpr int kParts = Visitor::kParts;
  const auto [channels, points, layout] = batch.slab;
  const Tiling tiling = Tiling::of(batch.slab, batch.dtype);
  const bool is_first = layout == Layout::ChannelsFirst;
  const Work work{tiling,
                  channels,
                  points,
                  batch.first,
                  batch.samples * tiling.tiles * (is_first ? channels : tiling.bands),
                  tiling.extent,
                  Divider(tiling.tiles),
                  Divider(is_first ? channels : tiling.bands)};
  if (work.items == 0 || channels == 0) return cudaSuccess;
  A* out = static_cast<A*>(tiling.tiles > 1 ? sums.partials : sums.sums);
  const A divisor = tiling.tiles > 1 ? A(1) : static_cast<A>(sums.divisor);
  cudaError_t error;
  if (is_first) {
    error = with_access<T>(tiling.access, [&]<int n>() {
      const int per_block = kThreads / tiling.lanes, at_once = per_block * kRowsAtOnce<Visitor, n>;
      const std::int64_t rows = batch.samples * channels;
      const std::int64_t most = divide_up(3 * kRowBlocks * batch.multiprocessors, tiling.tiles);
      const std::int64_t blocks = std::min(divide_up(rows, at_once), most), step = blocks * at_once;
      const RowWork by{per_block, rows, step, step / channels, step % channels};
      return launch(sum_rows<n, Visitor>, blocks * tiling.tiles, kThreads, 0, batch.stream, visitor, work, by, out,
                    divisor);
    });
  } else {
    const auto bands = [&]<int n>() {
      return launch(sum_bands<n, Visitor>, in_turns(work.items), kThreads, kThreads * n * sizeof(A), batch.stream,
                    visitor, work, out, divisor);
    };
    error = tiling.access == 1 ? bands.template operator()<1>() : bands.template operator()<kFull<T>>();
  }
  if (error != cudaSuccess || tiling.tiles == 1) return error;
  const std::int64_t columns = kParts * channels;
  return launch(finish_sums<A>, in_turns(divide_up(batch.samples * columns, kThreads)), kThreads, 0, batch.stream,
                static_cast<const A*>(sums.partials) + batch.first * tiling.tiles * columns,
                static_cast<A*>(sums.sums) + batch.first * columns, Divider(columns), tiling.tiles,
                batch.samples * columns, static_cast<A>(sums.divisor));
}

template <class Visitor>
cudaError_t launch_writes(const Batch& batch, const Visitor& visitor) {
  using T = typename Visitor::value_type;
  const auto [channels, points, layout] = batch.slab;
  const Tiling tiling = Tiling::of(batch.slab, batch.dtype);
  if (batch.samples == 0 || channels == 0 || points == 0) return cudaSuccess;
  if (layout == Layout::ChannelsFirst) {
    if (writes_across_rows(batch.slab, batch.dtype)) {
      constexpr std::int64_t kExtent = 2 * Visitor::kAhead * kThreads;
      const std::int64_t chunks = divide_up(channels * points / kFull<T>, kExtent);
      const Work work{tiling,  channels,        points,         batch.first, batch.samples * chunks,
                      kExtent, Divider(chunks), Divider(points)};
      return launch(write_linear<kFull<T>, Visitor>, in_turns(work.items), kThreads, 0, batch.stream, visitor, work);
    }
    const Work work{tiling,
                    channels,
                    points,
                    batch.first,
                    batch.samples * tiling.tiles * channels,
                    tiling.extent,
                    Divider(tiling.tiles),
                    Divider(channels)};
    return with_access<T>(tiling.access, [&]<int n>() {
      return launch(write_rows<n, Visitor>, in_turns(divide_up(work.items, kThreads / tiling.lanes)), kThreads, 0,
                    batch.stream, visitor, work);
    });
  }
  // Twice what a thread loads ahead.
  const std::int64_t extent = 2 * Visitor::kAhead * tiling.rows;
  const std::int64_t tiles = divide_up(points, extent);
  const Work work{tiling,
                  channels,
                  points,
                  batch.first,
                  batch.samples * tiling.bands * tiles,
                  extent,
                  Divider(tiles),
                  Divider(tiling.bands)};
  const auto bands = [&]<int n>() {
    return launch(write_bands<n, Visitor>, in_turns(work.items), kThreads, 0, batch.stream, visitor, work);
  };
  return tiling.access == 1 ? bands.template operator()<1>() : bands.template operator()<kFull<T>>();
}

// f(post): the identity apart from all others
template <class F>
cudaError_t with_post(Activation post, const F& f) {
  return post == Activation::Identity ? f(Identity(post)) : f(Any(post));
}

}  // namespace se_ext::cuda
