// Writing a map tile by tile, into the caches or past them.
#pragma once

#include "traverse.h"

namespace se_ext::cpu::SE_EXT_ISA {

// Whether stores past the caches are possible: all whole registers of the tile lie aligned in the map at `data`.
template <class T>
SE_EXT_INLINE bool is_aligned(const Slab& slab, Tile tile, const T* data) {
  constexpr std::int64_t L = kLanes<acc_t<T>>;
  const bool channels_first = slab.layout == Layout::ChannelsFirst;
  const T* first = data + tile.begin * (channels_first ? slab.points : slab.channels);
  return reinterpret_cast<std::uintptr_t>(first) % (L * sizeof(T)) == 0 &&
         (channels_first ? slab.points >= L : slab.channels % L == 0);
}

// The same for a walk that starts every row anew (sum_tile).
template <class T>
SE_EXT_INLINE bool rows_are_aligned(const Slab& slab, Tile tile, const T* data) {
  return is_aligned(slab, tile, data) && (slab.layout == Layout::ChannelsLast || slab.points % kLanes<acc_t<T>> == 0);
}

// The two ways to write a map, for visit_tile.
template <class T>
struct ToCache {
  T* data;
  template <class V, class L>
  inline SE_EXT_ALWAYS_INLINE void operator()(std::int64_t i, V v, L lanes) const {
    store(data + i, v, lanes);
  }
  template <class V>
  inline SE_EXT_ALWAYS_INLINE void two(std::int64_t i, V v0, V v1) const {
    store_two(data + i, v0, v1);
  }
};
template <class T>
struct PastCache {
  T* data;
  template <class V>
  inline SE_EXT_ALWAYS_INLINE void operator()(std::int64_t i, V v, All) const {
    stream(data + i, v);
  }
  template <class V>
  inline SE_EXT_ALWAYS_INLINE void operator()(std::int64_t i, V v, First lanes) const {
    store(data + i, v, lanes);
  }
};

// Writes compute's values to `data`, past the caches where that is asked for and possible. An expensive computation
// hides its stores, so that it has one way only.
template <Layout layout, bool kCheap, class T, class Factory>
SE_EXT_INLINE void write_tile(const Slab& slab, Tile tile, T* data, bool streaming, const Factory& factory) {
  if constexpr (kCheap) {
    if (streaming && is_aligned(slab, tile, data)) {
      visit_tile<layout, acc_t<T>, kCheap>(slab, tile, factory, PastCache<T>{data});
      fence_streams();
      return;
    }
  }
  visit_tile<layout, acc_t<T>, kCheap>(slab, tile, factory, ToCache<T>{data});
}

}  // namespace se_ext::cpu::SE_EXT_ISA
