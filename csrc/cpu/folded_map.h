// A narrow ChannelsLast map as one of more channels: several neighbouring points of C channels, which lie behind each
// other, as one point. So the kernels of a batch norm without an SE block behind it work on whole registers, and on
// enough of them that a running sum in memory is not needed again before it is written.
#pragma once

#include <cstring>

#include "../feature_map.h"

namespace se_ext::cpu {

struct FoldedMap : FeatureMap {
  std::int64_t channels;  // C; slab.channels = fold · C
  std::int64_t fold = 1;  // points in one

  explicit FoldedMap(const FeatureMap& map, bool may_fold = true) : FeatureMap(map), channels(slab.channels) {
    if (!may_fold || slab.layout != Layout::ChannelsLast || channels == 0) return;
    fold = points_in_one(channels, slab.points);
    slab.channels *= fold;
    slab.points /= fold;
  }

  // A vector [C] as one of the folded map, `from` repeated.
  void repeat(const void* from, Pointer to) const {
    for (std::int64_t i = 0; i < fold; ++i) std::memcpy(to.at(i * channels), from, channels * to.item_bytes);
  }

 private:
  static constexpr std::int64_t kWide = 128;  // channels: eight of the widest registers, whose sums hide the latency
  static constexpr std::int64_t kWhole = 16;  // channels of which a register is always whole
  static constexpr std::int64_t kMostPoints = 16;

  // The fewest that make the map wide, of whole registers where there is a choice. It depends on C and P alone, as does
  // the order of the sums.
  static std::int64_t points_in_one(std::int64_t channels, std::int64_t points) {
    std::int64_t wide = 1;
    for (std::int64_t k = 1; k <= kMostPoints; ++k) {
      if (points % k != 0 || k * channels < kWide) continue;
      if (k * channels % kWhole == 0) return k;
      if (wide == 1) wide = k;
    }
    return wide;
  }
};

}  // namespace se_ext::cpu
