// How the threads walk over the map. A visitor says what is loaded at an index, what is added to its channel's sums, or
// what is written; a walk says who visits which index. Loads of kAhead accesses are issued before the first of them is
// used.
//
// A visitor of type V has
//   V::value_type                          the map's type
//   V::kParts                              sums per channel
//   V::kMaps                               maps that are read
//   V::kBlocks                             of a kernel that sums, on a multiprocessor: it has registers for so many
//   V::kAhead                              accesses loaded ahead: some 64 to 128 bytes per thread keep memory busy
//   prepare<n>(sample, channels)           what an access of n values needs of its channels: a struct of Lanes
//   begin_at(i)                            makes index i of the maps index 0
//   each_map(f)                            f(map, number) with a reference to each map that both passes read
//   load<n>(i, at)                         the raw values at index i of the maps; of those that both passes read at
//                                          `at`, which is i but where they lie in shared memory
//   add<n>(raw, prepared, sums)            sums[part] += …, lane by lane
//   write<n>(i, raw, prepared)             the results of the access
#pragma once

#include "../tiling.h"
#include "divider.cuh"
#include "values.cuh"

namespace se_ext::cuda {

// ---- the channels of an access ----

struct Same {  // all values are of one channel
  std::int64_t channel;
};
struct Split {  // those from `at` on are of the next channel
  std::int64_t channel;
  int at;
  bool has_next;  // false in the last channel
};
struct Consecutive {  // value j is of channel + j
  std::int64_t channel;
};

// values[offset + channel of lane j]; `otherwise` where there are no values
template <int n, class A>
SE_EXT_DEVICE Lanes<A, n> per_channel(const A* values, std::int64_t offset, Same channels, A otherwise = 1) {
  const A one = values ? values[offset + channels.channel] : otherwise;
  return lanes<A, n>([&](int) { return one; });
}
template <int n, class A>
SE_EXT_DEVICE Lanes<A, n> per_channel(const A* values, std::int64_t offset, Split channels, A otherwise = 1) {
  const A first = values ? values[offset + channels.channel] : otherwise;
  const A second = values && channels.has_next ? values[offset + channels.channel + 1] : first;
  return lanes<A, n>([&](int j) { return j < channels.at ? first : second; });
}
template <int n, class A>
SE_EXT_DEVICE Lanes<A, n> per_channel(const A* values, std::int64_t offset, Consecutive channels, A otherwise = 1) {
  if (!values) return lanes<A, n>([&](int) { return otherwise; });
  return load<n>(values + offset + channels.channel);
}

// ---- sums ----

template <class Visitor, int n>
struct Accumulators {
  using A = acc_t<typename Visitor::value_type>;
  Lanes<A, n> part[Visitor::kParts];

  SE_EXT_DEVICE Accumulators() {
    SE_EXT_UNROLL
    for (int k = 0; k < Visitor::kParts; ++k) part[k] = lanes<A, n>([](int) { return A(0); });
  }
};

// Adds the accesses at first, first + step, … below end, in this order; index(i) is where access i of the maps lies.
template <int n, class Visitor, class Prepared, class Index>
SE_EXT_DEVICE void add_all(const Visitor& visitor, const Prepared& prepared, std::int64_t first, std::int64_t end,
                           std::int64_t step, const Index& index, Accumulators<Visitor, n>& sums) {
  using Raw = decltype(visitor.template load<n>(0, 0));
  for (std::int64_t i = first; i < end; i += Visitor::kAhead * step) {
    Raw raw[Visitor::kAhead];
    SE_EXT_UNROLL
    for (int k = 0; k < Visitor::kAhead; ++k) {
      if (i + k * step < end) {
        const std::int64_t at = index(i + k * step);
        raw[k] = visitor.template load<n>(at, at);
      }
    }
    SE_EXT_UNROLL
    for (int k = 0; k < Visitor::kAhead; ++k) {
      if (i + k * step < end) visitor.template add<n>(raw[k], prepared, sums.part);
    }
  }
}

// The sums of an access, then those of `lanes` neighbours of a warp, all of which return them.
template <int n, class Visitor>
SE_EXT_DEVICE Accumulators<Visitor, 1> across_lanes(Accumulators<Visitor, n>& wide, int lanes) {
  Accumulators<Visitor, 1> sums;
  SE_EXT_UNROLL
  for (int k = 0; k < Visitor::kParts; ++k) {
    auto& part = wide.part[k];
    SE_EXT_UNROLL
    for (int half = n / 2; half > 0; half /= 2) {
      SE_EXT_UNROLL
      for (int j = 0; j < half; ++j) part[j] += part[j + half];
    }
    auto sum = part[0];
    for (int mask = lanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    sums.part[k][0] = sum;
  }
  return sums;
}

// A tile of a row, summed by `lanes` neighbours of a warp: all of them return the sums. `row` counts the rows where
// the maps lie. Every thread of the warp must come here.
template <int n, class Visitor>
SE_EXT_DEVICE Accumulators<Visitor, 1> sum_row(const Visitor& visitor, std::int64_t sample, std::int64_t channel,
                                               std::int64_t row, std::int64_t tile, const Tiling& tiling,
                                               std::int64_t accesses) {
  const int lane = static_cast<int>(threadIdx.x) & (tiling.lanes - 1);
  const std::int64_t begin = tile * tiling.extent;
  const std::int64_t end = begin + tiling.extent < accesses ? begin + tiling.extent : accesses;
  const auto prepared = visitor.template prepare<n>(sample, Same{channel});
  const std::int64_t base = row * accesses;
  Accumulators<Visitor, n> wide;
  add_all<n>(visitor, prepared, begin + lane, end, tiling.lanes, [=](std::int64_t i) { return (base + i) * n; }, wide);
  return across_lanes(wide, tiling.lanes);
}

// What an access of n values of a row is summed with by a kernel that reads global memory. Accesses below 16 bytes, of
// rows that are not aligned to more, carry too few bytes each: more of them are loaded ahead, and where they are single
// values of one map, two rows' at a time.
template <class Visitor, int n>
inline constexpr bool kIsNarrow = n * sizeof(typename Visitor::value_type) < 16;
template <class Visitor, int n>
inline constexpr int kRowAhead = kIsNarrow<Visitor, n> ? 8 : Visitor::kAhead;
template <class Visitor, int n>
inline constexpr int kRowsAtOnce = n == 1 && sizeof(typename Visitor::value_type) <= 4 && Visitor::kMaps == 1 ? 2 : 1;

// As sum_row, of several rows by the same lanes: the loads of all of them are issued together. The maps of of_row[r]
// begin at this lane's first access of the tile.
template <int n, int rows, class Visitor, class Prepared>
SE_EXT_DEVICE void sum_rows_at_once(Lanes<Visitor, rows> of_row, const Lanes<Prepared, rows>& prepared, int accesses,
                                    int lanes, Lanes<Accumulators<Visitor, 1>, rows>& sums) {
  using Raw = decltype(of_row[0].template load<n>(0, 0));
  constexpr int kAhead = kRowAhead<Visitor, n>;
  Accumulators<Visitor, n> wide[rows];
  for (int i = static_cast<int>(threadIdx.x) & (lanes - 1); i < accesses; i += kAhead * lanes) {
    Raw raw[rows][kAhead];
    SE_EXT_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      const int at = k * lanes * n;
      if (i + k * lanes < accesses) {
        SE_EXT_UNROLL
        for (int r = 0; r < rows; ++r) raw[r][k] = of_row[r].template load<n>(at, at);
      }
    }
    // The maps move on with the loop: an access is then found with one addition of 32 bits.
    SE_EXT_UNROLL
    for (int r = 0; r < rows; ++r) of_row[r].begin_at(kAhead * lanes * n);
    SE_EXT_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      if (i + k * lanes < accesses) {
        SE_EXT_UNROLL
        for (int r = 0; r < rows; ++r) of_row[r].template add<n>(raw[r][k], prepared[r], wide[r].part);
      }
    }
  }
  SE_EXT_UNROLL
  for (int r = 0; r < rows; ++r) sums[r] = across_lanes(wide[r], lanes);
}

// Of a block that has all of a band, and takes a tile at a time.
SE_EXT_DEVICE BandLayout whole_band(const Tiling& tiling) {
  return {tiling.width, tiling.rows, 1};
}

// As many tiles as the layout has, from `tile` on, of up to `width` accesses side by side, from `first_channel` on,
// summed by the block: put(part, tile, channel, sum) is called once for each of them, tiles counted from `tile`;
// index(point, channel) is where the maps' access lies. `shared` has room for a value per thread and value of an
// access. Starts and ends with all threads of the block together.
template <int n, class Visitor, class Index, class Put>
SE_EXT_DEVICE void sum_band(const Visitor& visitor, std::int64_t sample, std::int64_t first_channel,
                            std::int64_t end_channel, std::int64_t tile, const Tiling& tiling, BandLayout layout,
                            std::int64_t points, acc_t<typename Visitor::value_type>* shared, const Index& index,
                            const Put& put) {
  using A = acc_t<typename Visitor::value_type>;
  const int thread = static_cast<int>(threadIdx.x);
  const int row = thread / layout.width, column = thread - row * layout.width;
  const int rows = layout.tiles * tiling.rows;
  const std::int64_t mine = first_channel + column * n;
  Accumulators<Visitor, n> sums;
  if (row < rows && mine < end_channel) {
    const int tile_of_row = row / tiling.rows;
    const std::int64_t begin = (tile + tile_of_row) * tiling.extent;
    const std::int64_t end = begin + tiling.extent < points ? begin + tiling.extent : points;
    const auto prepared = visitor.template prepare<n>(sample, Consecutive{mine});
    add_all<n>(
        visitor, prepared, begin + (row - tile_of_row * tiling.rows), end, tiling.rows,
        [=](std::int64_t p) { return index(p, mine); }, sums);
  }
  const int wide = layout.width * n;
  SE_EXT_UNROLL
  for (int k = 0; k < Visitor::kParts; ++k) {
    if (row < rows) {
      SE_EXT_UNROLL
      for (int j = 0; j < n; ++j) shared[row * wide + column * n + j] = sums.part[k][j];
    }
    __syncthreads();
    const int of_tile = thread / wide, within = thread - of_tile * wide;
    const std::int64_t channel = first_channel + within;
    if (of_tile < layout.tiles && tile + of_tile < tiling.tiles && channel < end_channel) {
      const A* first = shared + of_tile * tiling.rows * wide + within;
      A sum = first[0];
      for (int r = 1; r < tiling.rows; ++r) sum += first[r * wide];
      put(k, of_tile, channel, sum);
    }
    __syncthreads();
  }
}

// ---- writes ----

// index(i) is where access i of the maps lies, read_index(i) that of those which both passes read.
template <int n, class Visitor, class Prepared, class Index, class ReadIndex>
SE_EXT_DEVICE void write_all(const Visitor& visitor, const Prepared& prepared, std::int64_t first, std::int64_t end,
                             std::int64_t step, const Index& index, const ReadIndex& read_index) {
  using Raw = decltype(visitor.template load<n>(0, 0));
  for (std::int64_t i = first; i < end; i += Visitor::kAhead * step) {
    Raw raw[Visitor::kAhead];
    SE_EXT_UNROLL
    for (int k = 0; k < Visitor::kAhead; ++k) {
      if (i + k * step < end) raw[k] = visitor.template load<n>(index(i + k * step), read_index(i + k * step));
    }
    SE_EXT_UNROLL
    for (int k = 0; k < Visitor::kAhead; ++k) {
      if (i + k * step < end) visitor.template write<n>(index(i + k * step), raw[k], prepared);
    }
  }
}

// A tile of a row, by `lanes` neighbours of a warp; `row` counts the rows of the maps,
// `read_row` those of the maps that both passes read.
template <int n, class Visitor>
SE_EXT_DEVICE void write_row(const Visitor& visitor, std::int64_t sample, std::int64_t channel, std::int64_t row,
                             std::int64_t read_row, std::int64_t tile, const Tiling& tiling, std::int64_t accesses) {
  const int lane = static_cast<int>(threadIdx.x) & (tiling.lanes - 1);
  const std::int64_t begin = tile * tiling.extent;
  const std::int64_t end = begin + tiling.extent < accesses ? begin + tiling.extent : accesses;
  const std::int64_t base = row * accesses, read_base = read_row * accesses;
  write_all<n>(
      visitor, visitor.template prepare<n>(sample, Same{channel}), begin + lane, end, tiling.lanes,
      [=](std::int64_t i) { return (base + i) * n; }, [=](std::int64_t i) { return (read_base + i) * n; });
}

// Accesses [begin, end) of a sample whose rows are not aligned to an access: an access has values of up to two rows.
// Thread `thread` of `threads` takes every threads-th of them. The value at the start of the sample lies at
// read_base in the maps that both passes read, or would lie there, where they hold only some of the accesses.
template <int n, class Visitor>
SE_EXT_DEVICE void write_across_rows(const Visitor& visitor, std::int64_t sample, std::int64_t read_base,
                                     std::int64_t begin, std::int64_t end, std::int64_t thread, std::int64_t threads,
                                     std::int64_t channels, const Divider& by_points) {
  using Raw = decltype(visitor.template load<n>(0, 0));
  const std::int64_t base = sample * channels * by_points.divisor;
  for (std::int64_t i = begin + thread; i < end; i += Visitor::kAhead * threads) {
    Raw raw[Visitor::kAhead];
    SE_EXT_UNROLL
    for (int k = 0; k < Visitor::kAhead; ++k) {
      if (i + k * threads < end) {
        const std::int64_t at = (i + k * threads) * n;
        raw[k] = visitor.template load<n>(base + at, read_base + at);
      }
    }
    SE_EXT_UNROLL
    for (int k = 0; k < Visitor::kAhead; ++k) {
      const std::int64_t access = i + k * threads;
      if (access < end) {
        const auto [channel, point] = by_points(access * n);
        const std::int64_t left = by_points.divisor - point;
        const Split split{channel, left < n ? static_cast<int>(left) : n, channel + 1 < channels};
        visitor.template write<n>(base + access * n, raw[k], visitor.template prepare<n>(sample, split));
      }
    }
  }
}

// Points [begin, end) of up to `width` accesses side by side, from `first_channel` on, by the block; read_index(point,
// channel) is where it lies in the maps that both passes read.
template <int n, class Visitor, class ReadIndex>
SE_EXT_DEVICE void write_band(const Visitor& visitor, std::int64_t sample, std::int64_t first_channel,
                              std::int64_t end_channel, std::int64_t begin, std::int64_t end, BandLayout layout,
                              std::int64_t channels, std::int64_t points, const ReadIndex& read_index) {
  const int thread = static_cast<int>(threadIdx.x);
  const int row = thread / layout.width, column = thread - row * layout.width;
  const std::int64_t mine = first_channel + column * n;
  if (row >= layout.rows || mine >= end_channel) return;
  const std::int64_t base = sample * points;
  write_all<n>(
      visitor, visitor.template prepare<n>(sample, Consecutive{mine}), begin + row, end, layout.rows,
      [=](std::int64_t p) { return (base + p) * channels + mine; },
      [=](std::int64_t p) { return read_index(p, mine); });
}

}  // namespace se_ext::cuda
