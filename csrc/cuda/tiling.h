// How a slab is cut up among threads and blocks. A function of the slab and its dtype alone, never of the batch or the
// device, so that every path takes every sum in the same order.
//
// ChannelsFirst: a row is the P values of a channel; `lanes` threads of a warp share a tile of it.
// ChannelsLast: a band is `width` accesses side by side; a block takes a tile of the points of one band, each of its
// `rows` rows of threads every rows-th point.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../params.h"

namespace se_ext::cuda {

constexpr int kThreads = 256;  // per block, in every kernel over the map
constexpr int kWarp = 32;
constexpr int kAccessBytes = 16;

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

constexpr int size_of(DType type) {
  return type == DType::Float64 ? 8 : type == DType::Float32 ? 4 : 2;
}

// Values per access of 16 bytes.
constexpr int full_access(DType type) {
  return kAccessBytes / size_of(type);
}

struct Tiling {
  int access;           // values per access of the kernels that sum: 16 bytes, 8, or one value
  int lanes = 0;        // ChannelsFirst
  int width = 0;        // ChannelsLast
  int rows = 0;         // ChannelsLast
  std::int64_t bands;   // ChannelsLast; else 1
  std::int64_t extent;  // accesses of a row per tile, or points per tile
  std::int64_t tiles;   // per row, or per band

  static Tiling of(const Slab& slab, DType type) {
    return slab.layout == Layout::ChannelsFirst ? of_rows(slab.points, type) : of_bands(slab, type);
  }

 private:
  // The widest access that divides `length`: all of its rows are then aligned to it.
  static int widest(std::int64_t length, DType type) {
    const int full = full_access(type);
    if (length % full == 0) return full;
    return full == 8 && length % 4 == 0 ? 4 : 1;
  }

  // Four accesses a lane and more keep enough loads in flight; beyond 128 a row is cut, so that a volume of few
  // channels has work for the whole device.
  static Tiling of_rows(std::int64_t points, DType type) {
    Tiling t{};
    t.access = widest(points, type);
    t.bands = 1;
    const std::int64_t accesses = points / t.access;
    t.lanes = 1;
    while (t.lanes < kWarp && accesses >= 8 * t.lanes) t.lanes *= 2;
    t.tiles = accesses > 128 * kWarp ? divide_up(accesses, 128 * kWarp) : 1;
    t.extent = accesses > 0 ? divide_up(accesses, t.tiles) : 1;
    return t;
  }

  // Bands of equal width of up to a warp's 512 bytes. Up to eight tiles where each thread has two points and more of
  // one, so that a small batch has work for the whole device; more where a thread would walk over 16; up to 256, which
  // are summed one after the other.
  static Tiling of_bands(const Slab& slab, DType type) {
    Tiling t{};
    const int full = full_access(type);
    t.access = slab.channels % full == 0 ? full : 1;
    const std::int64_t columns = slab.channels / t.access;
    t.bands = columns > kWarp ? divide_up(columns, kWarp) : 1;
    t.width = columns > 0 ? static_cast<int>(divide_up(columns, t.bands)) : 1;
    t.rows = kThreads / t.width;
    t.tiles = 1;
    while (t.tiles < 8 && slab.points >= 4 * t.tiles * t.rows) t.tiles *= 2;
    const std::int64_t of_eight = divide_up(slab.points, 8 * 16 * t.rows);
    if (of_eight > 1) t.tiles = 8 * std::min<std::int64_t>(32, of_eight);
    t.extent = slab.points > 0 ? divide_up(slab.points, t.tiles) : 1;
    t.tiles = slab.points > 0 ? divide_up(slab.points, t.extent) : 1;
    return t;
  }
};

// ChannelsLast: where the threads of a block stand over columns of accesses that lie side by side. Rows of threads that
// a tile does not need take further tiles, so that a block with few of a slab's channels is busy all the same.
struct BandLayout {
  int width;  // columns
  int rows;   // of threads
  int tiles;  // summed at a time, each by Tiling::rows rows of threads

  // Over a share of the slab's columns: bands of equal width, none wider than those of the slab.
  static BandLayout of_share(const Tiling& t, std::int64_t columns) {
    const int width = columns > 0 ? static_cast<int>(divide_up(columns, divide_up(columns, t.width))) : 1;
    const int rows = kThreads / width;
    return {width, rows, static_cast<int>(std::min<std::int64_t>(rows / t.rows, t.tiles))};
  }
};

// A product with a transposed weight, out[column] = Σ_row grad[row] weight[row, column]: kPieceRows rows one after the
// other are a piece; of the pieces, every kPieceGroups-th is of one group. A piece is summed in order, then the pieces
// of a group, then the groups. A thread has kSide columns.
constexpr int kPieceRows = 8;
constexpr int kPieceGroups = 16;
constexpr int kSide = 4;

// ChannelsFirst: rows that are not aligned to any access are written 16 bytes at a time across their ends, where an
// access has at most two rows and every sample is aligned.
inline bool writes_across_rows(const Slab& slab, DType type) {
  const int full = full_access(type);
  return Tiling::of(slab, type).access == 1 && slab.points >= full && slab.channels % full == 0;
}

}  // namespace se_ext::cuda
