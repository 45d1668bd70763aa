// Planes of channels as blocks of points, and back: as many channels as a register has lanes become the lanes of one
// register per point. It reads and writes each value once; squares of registers are transposed in registers.
#pragma once

#include "../vec.h"

namespace se_ext::cpu::SE_EXT_ISA {

template <class L>
SE_EXT_INLINE bool is_among(int i, L lanes) {
  if constexpr (requires { lanes.count; }) return i < lanes.count;
  return true;
}

// kWhole: every lane has a channel; else `live` of them.
template <class T, bool kWhole, class L>
SE_EXT_INLINE void square_to_block(int live, std::int64_t plane, const T* from, acc_t<T>* to, L points) {
  using A = acc_t<T>;
  constexpr int n = kLanes<A>;
  Vec<A> v[n];
#pragma GCC unroll 16
  for (int c = 0; c < n; ++c) v[c] = kWhole || c < live ? load(from + c * plane, points) : Vec<A>{};
  transpose<A>(v);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    if (is_among(i, points)) store(to + i * n, v[i], All{});
  }
}

template <class T, bool kWhole, class L>
SE_EXT_INLINE void square_from_block(int live, std::int64_t plane, const acc_t<T>* from, T* to, L points) {
  using A = acc_t<T>;
  constexpr int n = kLanes<A>;
  Vec<A> v[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) v[i] = is_among(i, points) ? load(from + i * n, All{}) : Vec<A>{};
  transpose<A>(v);
#pragma GCC unroll 16
  for (int c = 0; c < n; ++c) {
    if (kWhole || c < live) store(to + c * plane, v[c], points);
  }
}

// f(channel, live) for each block.
template <class A, class F>
SE_EXT_INLINE void for_blocks(std::int64_t channels, F&& f) {
  for (std::int64_t c = 0; c < channels; c += kLanes<A>)
    f(c, static_cast<int>(min_of<std::int64_t>(channels - c, kLanes<A>)));
}

template <class T>
void to_blocks(std::int64_t channels, std::int64_t points, std::int64_t plane, std::int64_t block, const void* planes,
               void* blocks) {
  using A = acc_t<T>;
  constexpr int n = kLanes<A>;
  for_blocks<A>(channels, [&](std::int64_t c, int live) {
    const T* from = static_cast<const T*>(planes) + c * plane;
    A* to = static_cast<A*>(blocks) + c / n * block;
    for_lanes<A>(points, [&](std::int64_t i, auto lanes) SE_EXT_ALWAYS_INLINE {
      if (live == n) {
        square_to_block<T, true>(live, plane, from + i, to + i * n, lanes);
      } else {
        square_to_block<T, false>(live, plane, from + i, to + i * n, lanes);
      }
    });
  });
}

template <class T>
void from_blocks(std::int64_t channels, std::int64_t points, std::int64_t plane, std::int64_t block, const void* blocks,
                 void* planes) {
  using A = acc_t<T>;
  constexpr int n = kLanes<A>;
  for_blocks<A>(channels, [&](std::int64_t c, int live) {
    const A* from = static_cast<const A*>(blocks) + c / n * block;
    T* to = static_cast<T*>(planes) + c * plane;
    for_lanes<A>(points, [&](std::int64_t i, auto lanes) SE_EXT_ALWAYS_INLINE {
      if (live == n) {
        square_from_block<T, true>(live, plane, from + i * n, to + i, lanes);
      } else {
        square_from_block<T, false>(live, plane, from + i * n, to + i, lanes);
      }
    });
  });
}

}  // namespace se_ext::cpu::SE_EXT_ISA
