// How a slab is cut into tiles.
#pragma once

#include <algorithm>

#include "../feature_map.h"

namespace se_ext::cpu {

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

// Points that a float32 sum takes one after the other: more would lose digits.
inline constexpr std::int64_t kMostSummed = 4096;

// A slab's tiles. Their size depends on the slab and its dtype alone, never on threads or batch, so that partial sums
// over tiles are always combined in the same order.
struct Tiling {
  static constexpr std::int64_t kTileBytes = 32 * 1024;
  static constexpr std::int64_t kAligned = 32;    // channels, so that tiles start where a register does if slabs do
  static constexpr std::int64_t kFewPoints = 16;  // a tile's row of partial sums is small beside the tile
  static constexpr std::int64_t kMostTiles = 64;  // as far as kMostSummed allows

  std::int64_t extent;  // channels or points per tile
  std::int64_t total;   // channels or points in all
  std::int64_t count;

  explicit Tiling(const FeatureMap& map) {
    const bool channels_first = map.slab.layout == Layout::ChannelsFirst;
    const std::int64_t line = channels_first ? map.slab.points : map.slab.channels;
    total = channels_first ? map.slab.channels : map.slab.points;
    extent = std::max<std::int64_t>(1, kTileBytes / std::max<std::int64_t>(1, line * map.data.item_bytes));
    if (channels_first) {
      if (extent > kAligned) extent -= extent % kAligned;
    } else {
      extent = std::min(std::max({extent, kFewPoints, total / kMostTiles}), kMostSummed);
    }
    count = ceil_div(total, extent);
  }

  Tile tile(std::int64_t i) const { return {i * extent, std::min((i + 1) * extent, total)}; }
};

}  // namespace se_ext::cpu
