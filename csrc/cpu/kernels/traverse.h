// The two ways to walk a tile: sum it over its points, or visit every register of it.
//
// What happens at a register is a visitor f(offset, channel, lanes): `offset` counts elements from the start of the
// slab, `channel` is the first lane's channel. ChannelsFirst lanes share one channel; ChannelsLast lanes are
// neighbouring channels. Visitors come from a factory(Channels), called once per row in ChannelsFirst and once per
// tile in ChannelsLast, so that what belongs to a row stays in registers.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace se_ext::cpu::SE_EXT_ISA {

inline constexpr int kAccumulators = 4;          // independent ones hide the latency of an addition
inline constexpr int kLongRow = 16;              // registers from which a row is worth several accumulators
inline constexpr std::int64_t kRowBlock = 4096;  // a long row is summed in blocks: the error grows with P / 4096
inline constexpr int kColumnSums = 8;            // registers that hold the sums of a band of channels

// Whose values a ChannelsFirst register needs: all lanes are `channel`'s, or, where a row ends inside the register,
// the first lanes are and the others are the next channel's.
struct Channels {
  std::int64_t channel;
  int first = 0;  // 0: all lanes
};

template <class F>
SE_EXT_INLINE void dispatch_layout(Layout layout, F&& f) {
  if (layout == Layout::ChannelsFirst) {
    f.template operator()<Layout::ChannelsFirst>();
  } else {
    f.template operator()<Layout::ChannelsLast>();
  }
}

// One value per channel: a register of copies of one (ChannelsFirst), or a register of neighbours (ChannelsLast).
// `values` may only be null where at() is never called.
template <Layout layout, class A>
struct PerChannel;

template <class A>
struct PerChannel<Layout::ChannelsFirst, A> {
  Vec<A> value{};
  SE_EXT_ALWAYS_INLINE PerChannel(const A* values, Channels c) {
    if (!values) return;
    value = broadcast<A>(values[c.channel]);
    if (c.first) value = select(First{c.first}, value, broadcast<A>(values[c.channel + 1]));
  }
  template <class L>
  inline SE_EXT_ALWAYS_INLINE Vec<A> at(std::int64_t, L) const {
    return value;
  }
};

template <class A>
struct PerChannel<Layout::ChannelsLast, A> {
  const A* values;
  SE_EXT_ALWAYS_INLINE PerChannel(const A* vector, Channels) : values(vector) {}
  template <class L>
  inline SE_EXT_ALWAYS_INLINE Vec<A> at(std::int64_t channel, L lanes) const {
    return load(values + channel, lanes);
  }
};

// The channel's value at the first point: something near its mean, to be taken off before squares are summed.
template <Layout layout, class T>
struct FirstPoint;

template <class T>
struct FirstPoint<Layout::ChannelsFirst, T> {
  Vec<acc_t<T>> value;
  SE_EXT_ALWAYS_INLINE FirstPoint(const T* x, const Slab& slab, Channels c)
      : value(broadcast<acc_t<T>>(load_one(x + c.channel * slab.points))) {}
  template <class L>
  inline SE_EXT_ALWAYS_INLINE Vec<acc_t<T>> at(std::int64_t, L) const {
    return value;
  }
};

template <class T>
struct FirstPoint<Layout::ChannelsLast, T> {
  const T* x;
  SE_EXT_ALWAYS_INLINE FirstPoint(const T* map, const Slab&, Channels) : x(map) {}
  template <class L>
  inline SE_EXT_ALWAYS_INLINE Vec<acc_t<T>> at(std::int64_t channel, L lanes) const {
    return load(x + channel, lanes);
  }
};

// What a visitor returns is summed: a register, or several of them, whose sums lie C apart.
template <class A, int n>
struct Sums {
  Vec<A> v[n];

  inline SE_EXT_ALWAYS_INLINE Sums& operator+=(const Sums& o) {
    for (int k = 0; k < n; ++k) v[k] += o.v[k];
    return *this;
  }
  friend inline SE_EXT_ALWAYS_INLINE Sums operator+(Sums a, const Sums& b) { return a += b; }
};

template <class A, int n>
SE_EXT_INLINE Sums<A, n> select(First f, const Sums<A, n>& a, const Sums<A, n>& b) {
  Sums<A, n> r;
  for (int k = 0; k < n; ++k) r.v[k] = select(f, a.v[k], b.v[k]);
  return r;
}

template <class A, class S>
inline constexpr int kParts = sizeof(S) / sizeof(Vec<A>);

// Part k of a visitor's value.
template <class A>
SE_EXT_INLINE Vec<A> part(Vec<A> sum, int) {
  return sum;
}
template <class A, int n>
SE_EXT_INLINE Vec<A> part(const Sums<A, n>& sum, int k) {
  return sum.v[k];
}

// The lanes of one or of four rows' sums added up, for channels c, c + 1, ….
template <class A, class S>
SE_EXT_INLINE void put_row(const S& sum, A* sums, std::int64_t channels) {
  for (int k = 0; k < kParts<A, S>; ++k) sums[k * channels] = sum_lanes(part<A>(sum, k));
}
template <class A, class S>
SE_EXT_INLINE void put_four_rows(const S* four, A* sums, std::int64_t channels) {
  for (int k = 0; k < kParts<A, S>; ++k) {
    const Vec<A> rows[4] = {part<A>(four[0], k), part<A>(four[1], k), part<A>(four[2], k), part<A>(four[3], k)};
    sum_lanes_of_four(rows, sums + k * channels);
  }
}

// One long row as one S of partial sums: interleaved registers per block, blocks in order.
template <class A, class S, class Visitor>
SE_EXT_INLINE S sum_long_row(std::int64_t points, std::int64_t channel, Visitor&& f) {
  constexpr int L = kLanes<A>;
  constexpr int kChains = kParts<A, S> == 1 ? kAccumulators : (kParts<A, S> == 2 ? kAccumulators / 2 : 1);
  const std::int64_t row = channel * points;
  S total{};
  for (std::int64_t begin = 0; begin < points; begin += kRowBlock) {
    const std::int64_t end = min_of(begin + kRowBlock, points);
    S chain[kChains] = {};
    std::int64_t p = begin;
    for (; p + kChains * L <= end; p += kChains * L) {
      for (int k = 0; k < kChains; ++k) chain[k] += f(row + p + k * L, channel, All{});
    }
    for (int k = 0; k < kChains - 1; ++k) {
      if (p + L <= end) {
        chain[k] += f(row + p, channel, All{});
        p += L;
      }
    }
    if (p < end) {
      const First rest{static_cast<int>(end - p)};
      chain[kChains - 1] += select(rest, f(row + p, channel, rest), S{});
    }
    for (int step = kChains / 2; step > 0; step /= 2) {
      for (int k = 0; k < step; ++k) chain[k] += chain[k + step];
    }
    total += chain[0];
  }
  return total;
}

// One short row, of `whole` registers and `rest` lanes, as one S of partial sums.
template <class A, class S, class Visitor>
SE_EXT_INLINE S sum_short_row(std::int64_t points, std::int64_t whole, First rest, std::int64_t channel, Visitor&& f) {
  constexpr int L = kLanes<A>;
  constexpr bool kTwoChains = kParts<A, S> <= 2;  // more do not fit the registers
  const std::int64_t row = channel * points;
  S even{}, odd{};
  if (rest.count) even = select(rest, f(row + whole * L, channel, rest), S{});
  std::int64_t k = 0;
  if constexpr (kTwoChains) {
    for (; k + 2 <= whole; k += 2) {
      even += f(row + k * L, channel, All{});
      odd += f(row + (k + 1) * L, channel, All{});
    }
  }
  for (; k < whole; ++k) even += f(row + k * L, channel, All{});
  return kTwoChains ? even + odd : even;
}

// sums[c] = Σ_p f(p, c) for the tile's channels.
template <class A, class S, class Factory>
SE_EXT_INLINE void sum_rows(const Slab& slab, Tile tile, A* sums, Factory&& factory) {
  constexpr int L = kLanes<A>;
  const std::int64_t points = slab.points;
  if (points >= kLongRow * L) {
    for (std::int64_t c = tile.begin; c < tile.end; ++c) {
      put_row<A>(sum_long_row<A, S>(points, c, factory(Channels{c})), sums + c, slab.channels);
    }
    return;
  }
  const std::int64_t whole = points / L;
  const First rest{static_cast<int>(points % L)};
  const auto row = [&](std::int64_t c) SE_EXT_ALWAYS_INLINE {
    return sum_short_row<A, S>(points, whole, rest, c, factory(Channels{c}));
  };
  std::int64_t c = tile.begin;
  for (; c + 4 <= tile.end; c += 4) {
    const S four[4] = {row(c), row(c + 1), row(c + 2), row(c + 3)};
    put_four_rows<A>(four, sums + c, slab.channels);
  }
  for (; c < tile.end; ++c) put_row<A>(row(c), sums + c, slab.channels);
}

// A band of kWidth registers of channels, summed over the tile's points in kColumnSums registers: narrow bands take
// several points at once, as separate sums that are added in the end.
template <class A, int kWidth, class Visitor, class L>
SE_EXT_INLINE void sum_band(std::int64_t C, Tile tile, std::int64_t c, A* sums, const Visitor& f, L lanes) {
  constexpr int kPoints = kColumnSums / kWidth;
  Vec<A> sum[kPoints][kWidth] = {};
  const auto add = [&](Vec<A>* to, std::int64_t p) SE_EXT_ALWAYS_INLINE {
    for (int r = 0; r < kWidth; ++r) to[r] += f(p * C + c + r * kLanes<A>, c + r * kLanes<A>, lanes);
  };
  std::int64_t p = tile.begin;
  for (; p + kPoints <= tile.end; p += kPoints) {
    for (int k = 0; k < kPoints; ++k) add(sum[k], p + k);
  }
  for (int k = 0; k < kPoints - 1; ++k) {
    if (p + k < tile.end) add(sum[k], p + k);
  }
  for (int step = kPoints / 2; step > 0; step /= 2) {
    for (int k = 0; k < step; ++k) {
      for (int r = 0; r < kWidth; ++r) sum[k][r] += sum[k + step][r];
    }
  }
  for (int r = 0; r < kWidth; ++r) store(sums + c + r * kLanes<A>, sum[0][r], lanes);
}

// The same for all channels, sums in memory. Points are read one after the other, as they lie: a visitor that computes
// much keeps the CPU from running ahead to a band's next points, which lie C apart and no prefetcher finds.
template <class A, class S, class Visitor>
SE_EXT_INLINE void sum_points(std::int64_t C, Tile tile, A* sums, const Visitor& f) {
  const auto add = [&](const S& value, std::int64_t c, auto lanes) SE_EXT_ALWAYS_INLINE {
    for (int k = 0; k < kParts<A, S>; ++k) {
      A* to = sums + k * C + c;
      store(to, load(to, lanes) + part<A>(value, k), lanes);
    }
  };
  for (std::int64_t i = 0; i < kParts<A, S> * C; ++i) sums[i] = 0;
  for (std::int64_t p = tile.begin; p < tile.end; ++p) {
    for_lanes<A>(C, [&](std::int64_t c, auto lanes) SE_EXT_ALWAYS_INLINE { add(f(p * C + c, c, lanes), c, lanes); });
  }
}

// sums[c] = Σ_p f(p, c) over the tile's points, for all channels.
template <class A, class S, bool kCheap, class Factory>
SE_EXT_INLINE void sum_columns(const Slab& slab, Tile tile, A* sums, Factory&& factory) {
  const std::int64_t C = slab.channels;
  const auto f = factory(Channels{0});
  if constexpr (kParts<A, S> > 1 || !kCheap) {
    sum_points<A, S>(C, tile, sums, f);
  } else {
    constexpr int L = kLanes<A>;
    std::int64_t c = 0;
    for (; c + 8 * L <= C; c += 8 * L) sum_band<A, 8>(C, tile, c, sums, f, All{});
    if (c + 4 * L <= C) {
      sum_band<A, 4>(C, tile, c, sums, f, All{});
      c += 4 * L;
    }
    if (c + 2 * L <= C) {
      sum_band<A, 2>(C, tile, c, sums, f, All{});
      c += 2 * L;
    }
    if (c + L <= C) {
      sum_band<A, 1>(C, tile, c, sums, f, All{});
      c += L;
    }
    if (c < C) sum_band<A, 1>(C, tile, c, sums, f, First{static_cast<int>(C - c)});
  }
}

// kCheap: the visitor waits for memory alone.
template <Layout layout, bool kCheap = true, class A, class Factory>
SE_EXT_INLINE void sum_tile(const Slab& slab, Tile tile, A* sums, Factory&& factory) {
  using S = decltype(factory(Channels{0})(std::int64_t{}, std::int64_t{}, All{}));
  if constexpr (layout == Layout::ChannelsFirst) {
    sum_rows<A, S>(slab, tile, sums, factory);
  } else {
    sum_columns<A, S, kCheap>(slab, tile, sums, factory);
  }
}

// Four neighbouring registers, all read before any is written. Torch's tensors often lie a multiple of 4096 bytes and
// a few cache lines apart; then a load right behind a store looks as if it read what was just stored, and waits.
template <class A, class Compute, class Write>
SE_EXT_INLINE void visit_four(std::int64_t i, std::int64_t channel, std::int64_t step, const Compute& compute,
                              const Write& write) {
  constexpr int L = kLanes<A>;
  const auto v0 = compute(i, channel, All{}), v1 = compute(i + L, channel + step, All{}),
             v2 = compute(i + 2 * L, channel + 2 * step, All{}), v3 = compute(i + 3 * L, channel + 3 * step, All{});
  if constexpr (requires { write.two(i, v0, v1); }) {
    write.two(i, v0, v1);
    write.two(i + 2 * L, v2, v3);
  } else {
    write(i, v0, All{});
    write(i + L, v1, All{});
    write(i + 2 * L, v2, All{});
    write(i + 3 * L, v3, All{});
  }
}

// ChannelsFirst is walked as one contiguous run: a register in which a row ends belongs to two channels, so that stores
// stay whole (and aligned, where the slab is) whatever P is. Rows shorter than a register are visited one by one.
template <class A, bool kCheap, class Factory, class Write>
SE_EXT_INLINE void visit_rows(const Slab& slab, Tile tile, const Factory& factory, const Write& write) {
  constexpr int L = kLanes<A>;
  const std::int64_t end = tile.end * slab.points;
  std::int64_t i = tile.begin * slab.points;
  for (std::int64_t c = tile.begin; c < tile.end; ++c) {
    const std::int64_t row_end = (c + 1) * slab.points;
    const auto compute = factory(Channels{c});
    if constexpr (kCheap) {
      for (; i + 4 * L <= row_end; i += 4 * L) visit_four<A>(i, c, 0, compute, write);
    }
    for (; i + L <= row_end; i += L) write(i, compute(i, c, All{}), All{});
    const int rest = static_cast<int>(row_end - i);
    if (rest <= 0) continue;
    if (i + L <= end && slab.points >= L) {
      const auto straddle = factory(Channels{c, rest});
      write(i, straddle(i, c, All{}), All{});
      i += L;
    } else {
      write(i, compute(i, c, First{rest}), First{rest});
      i = row_end;
    }
  }
}

template <class A, bool kCheap, class Factory, class Write>
SE_EXT_INLINE void visit_columns(const Slab& slab, Tile tile, const Factory& factory, const Write& write) {
  constexpr int L = kLanes<A>;
  const std::int64_t C = slab.channels;
  const auto compute = factory(Channels{0});
  for (std::int64_t p = tile.begin; p < tile.end; ++p) {
    std::int64_t c = 0;
    if constexpr (kCheap) {
      for (; c + 4 * L <= C; c += 4 * L) visit_four<A>(p * C + c, c, L, compute, write);
    }
    for (; c + L <= C; c += L) write(p * C + c, compute(p * C + c, c, All{}), All{});
    const First rest{static_cast<int>(C - c)};
    if (rest.count > 0) write(p * C + c, compute(p * C + c, c, rest), rest);
  }
}

// compute(offset, channel, lanes) reads, write(offset, value, lanes) stores, at every register of the tile. kCheap:
// compute waits for memory alone, so that four at a time are worth their code.
template <Layout layout, class A, bool kCheap, class Factory, class Write>
SE_EXT_INLINE void visit_tile(const Slab& slab, Tile tile, const Factory& factory, const Write& write) {
  if constexpr (layout == Layout::ChannelsFirst) {
    visit_rows<A, kCheap>(slab, tile, factory, write);
  } else {
    visit_columns<A, kCheap>(slab, tile, factory, write);
  }
}

}  // namespace se_ext::cpu::SE_EXT_ISA
