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

template <int n, class Visitor>
__global__ void __launch_bounds__(kThreads, 1)
    sum_rows(Visitor visitor, Work w, acc_t<typename Visitor::value_type>* out,
             acc_t<typename Visitor::value_type> divisor) {
  const int per_block = kThreads / w.tiling.lanes;
  const int thread = static_cast<int>(threadIdx.x);
  for (std::int64_t start = static_cast<std::int64_t>(blockIdx.x) * per_block; start < w.items;
       start += static_cast<std::int64_t>(gridDim.x) * per_block) {
    const std::int64_t mine = start + thread / w.tiling.lanes;
    const auto [row, tile] = w.by_tiles(mine < w.items ? mine : w.items - 1);
    const auto [sample, channel] = w.by_next(row);
    const std::int64_t in_batch = w.first_sample + sample;
    const auto sums =
        sum_row<n>(visitor, in_batch, channel, in_batch * w.channels + channel, tile, w.tiling, w.points / n);
    if (mine < w.items && (thread & (w.tiling.lanes - 1)) == 0) {
      SE_EXT_UNROLL
      for (int k = 0; k < Visitor::kParts; ++k) {
        out[sum_index<Visitor>(w, in_batch, tile, k, channel)] = sums.part[k][0] / divisor;
      }
    }
  }
}

template <int n, class Visitor>
__global__ void __launch_bounds__(kThreads, 1)
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

template <int n, class Visitor>
__global__ void __launch_bounds__(kThreads, 1) write_rows(Visitor visitor, Work w) {
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
__global__ void __launch_bounds__(kThreads, 1) write_linear(Visitor visitor, Work w) {
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
__global__ void __launch_bounds__(kThreads, 1) write_bands(Visitor visitor, Work w) {
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
      return launch(sum_rows<n, Visitor>, in_turns(divide_up(work.items, kThreads / tiling.lanes)), kThreads, 0,
                    batch.stream, visitor, work, out, divisor);
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
