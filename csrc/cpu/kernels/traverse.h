// The two ways to walk a tile: sum it over its points, or visit every register of it.
//
// What happens at a register is a visitor f(offset, channel, lanes): `offset` counts elements from the start of the
// slab, `channel` is the first lane's channel. ChannelsFirst lanes share one channel; ChannelsLast lanes are
// neighbouring channels. Visitors come from a factory(channel), called once per row in ChannelsFirst and once per
// tile in ChannelsLast, so that what belongs to a row stays in registers.
#pragma once

#include "../../params.h"
#include "vec.h"

namespace se_ext::cpu::SE_EXT_ISA {

inline constexpr int kChains = 4;                 // independent accumulators hide the latency of an addition
inline constexpr std::int64_t kRowBlock = 4096;   // a long row is summed in blocks: the error grows with P / 4096
inline constexpr std::int64_t kPointsAtOnce = 4;  // points added as a tree before they meet the running sum

// One value per channel: a register of copies of one (ChannelsFirst), or a register of neighbours (ChannelsLast).
template <Layout layout, class A>
struct PerChannel;

template <class A>
struct PerChannel<Layout::ChannelsFirst, A> {
  Vec<A> value;
  PerChannel(const A* values, std::int64_t channel) : value(values ? broadcast<A>(values[channel]) : Vec<A>{}) {}
  template <class L>
  inline SE_EXT_ALWAYS_INLINE Vec<A> at(std::int64_t, L) const {
    return value;
  }
};

template <class A>
struct PerChannel<Layout::ChannelsLast, A> {
  const A* values;
  PerChannel(const A* values_, std::int64_t) : values(values_) {}
  template <class L>
  inline SE_EXT_ALWAYS_INLINE Vec<A> at(std::int64_t channel, L lanes) const {
    return values ? load(values + channel, lanes) : Vec<A>{};
  }
};

// sums[c] = Σ_p f(p, c) for the tile's channels. Per row: kChains interleaved registers per block, blocks in order.
template <class A, class Factory>
SE_EXT_INLINE void sum_rows(const Slab& slab, Tile tile, A* sums, Factory&& factory) {
  constexpr int L = kLanes<A>;
  for (std::int64_t c = tile.begin; c < tile.end; ++c) {
    const auto f = factory(c);
    const std::int64_t row = c * slab.points;
    A total = 0;
    for (std::int64_t begin = 0; begin < slab.points; begin += kRowBlock) {
      const std::int64_t end = min_of(begin + kRowBlock, slab.points);
      Vec<A> chain[kChains] = {};
      std::int64_t p = begin;
      for (; p + kChains * L <= end; p += kChains * L) {
        for (int k = 0; k < kChains; ++k) chain[k] += f(row + p + k * L, c, All{});
      }
      for (int k = 0; k < kChains - 1; ++k) {
        if (p + L <= end) {
          chain[k] += f(row + p, c, All{});
          p += L;
        }
      }
      if (p < end) {
        const First rest{static_cast<int>(end - p)};
        chain[kChains - 1] += keep(f(row + p, c, rest), rest);
      }
      total += sum_lanes((chain[0] + chain[1]) + (chain[2] + chain[3]));
    }
    sums[c] = total;
  }
}

// sums[c] = Σ_p f(p, c) over the tile's points, for all channels. The running sums stay in the first-level cache.
template <class A, class Factory>
SE_EXT_INLINE void sum_columns(const Slab& slab, Tile tile, A* sums, Factory&& factory) {
  const std::int64_t C = slab.channels;
  const auto f = factory(0);
  for_lanes<A>(C, [=](std::int64_t c, auto lanes) SE_EXT_ALWAYS_INLINE { store(sums + c, Vec<A>{}, lanes); });
  std::int64_t p = tile.begin;
  for (; p + kPointsAtOnce <= tile.end; p += kPointsAtOnce) {
    for_lanes<A>(C, [=](std::int64_t c, auto lanes) SE_EXT_ALWAYS_INLINE {
      const std::int64_t i = p * C + c;
      const Vec<A> sum = (f(i, c, lanes) + f(i + C, c, lanes)) + (f(i + 2 * C, c, lanes) + f(i + 3 * C, c, lanes));
      store(sums + c, load(sums + c, lanes) + sum, lanes);
    });
  }
  for (; p < tile.end; ++p) {
    for_lanes<A>(C, [=](std::int64_t c, auto lanes) SE_EXT_ALWAYS_INLINE {
      store(sums + c, load(sums + c, lanes) + f(p * C + c, c, lanes), lanes);
    });
  }
}

template <Layout layout, class A, class Factory>
SE_EXT_INLINE void sum_tile(const Slab& slab, Tile tile, A* sums, Factory&& factory) {
  if constexpr (layout == Layout::ChannelsFirst) {
    sum_rows<A>(slab, tile, sums, factory);
  } else {
    sum_columns<A>(slab, tile, sums, factory);
  }
}

template <Layout layout, class A, class Factory>
SE_EXT_INLINE void visit_tile(const Slab& slab, Tile tile, Factory&& factory) {
  if constexpr (layout == Layout::ChannelsFirst) {
    for (std::int64_t c = tile.begin; c < tile.end; ++c) {
      const auto f = factory(c);
      const std::int64_t row = c * slab.points;
      for_lanes<A>(slab.points, [=](std::int64_t p, auto lanes) SE_EXT_ALWAYS_INLINE { f(row + p, c, lanes); });
    }
  } else {
    const auto f = factory(0);
    for (std::int64_t p = tile.begin; p < tile.end; ++p) {
      const std::int64_t pixel = p * slab.channels;
      for_lanes<A>(slab.channels, [=](std::int64_t c, auto lanes) SE_EXT_ALWAYS_INLINE { f(pixel + c, c, lanes); });
    }
  }
}

}  // namespace se_ext::cpu::SE_EXT_ISA
