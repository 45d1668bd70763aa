// The gradient of a depthwise convolution's weights: for each channel and tap, a sum over all points of the batch.
//
// The sums of some rows of the filter stay in registers, a register of channels each, while a tile of g that is in
// registers too meets the columns of x: a column is loaded once and meets every tap. 5 × 5 sums and four of g fit the
// 32 registers of AVX-512; with 16, as many rows of the filter as fit are taken at a time, and g and x are read again
// from the first-level cache. A sum runs over the points of a sample in their order.
#pragma once

#include "../vec.h"
#include "kernels.h"

namespace se_ext::cpu::SE_EXT_ISA {

#if defined(__AVX512F__)
inline constexpr int kRegisters = 32;
#else
inline constexpr int kRegisters = 16;
#endif
inline constexpr int kGradientTile = 4;  // columns of g in registers

template <int kTaps>
inline constexpr int kRowsAtOnce =
    kTaps * kTaps + kGradientTile < kRegisters ? kTaps : (kRegisters - kGradientTile - 1) / kTaps;

template <class T, int kTaps, int kStride, int kRows, bool kInside, class L>
SE_EXT_INLINE void add_tile(Vec<acc_t<T>> (&sums)[kRows][kTaps], const Vec<acc_t<T>> (&g)[kGradientTile],
                            const GradientRows& p, const void* const* rows, std::int64_t first, int used,
                            std::int64_t c, L lanes) {
  using V = Vec<acc_t<T>>;
  constexpr int kColumns = (kGradientTile - 1) * kStride + kTaps;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const T* x = static_cast<const T*>(rows[r]);
    if (!x) continue;
#pragma GCC unroll 32
    for (int q = 0; q < kColumns; ++q) {
      if (!kInside && (q >= used || first + q < 0 || first + q >= p.width)) continue;
      const V v = load(x + ((first + q) * p.step + c), lanes);
#pragma GCC unroll 16
      for (int k = 0; k < kTaps; ++k) {
        const int j = (q - k) / kStride;
        if (q >= k && (q - k) % kStride == 0 && j < kGradientTile) sums[r][k] += v * g[j];
      }
    }
  }
}

template <class T, int kTaps, int kStride, int kRows, class L>
SE_EXT_INLINE void gradient_of_lanes(const GradientRows& p, std::int64_t c, L lanes) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int n = kLanes<A>;
  constexpr int kColumns = (kGradientTile - 1) * kStride + kTaps;
  A* const gw = static_cast<A*>(p.gw) + c / n * p.block;
  A* const gb = p.gb ? static_cast<A*>(p.gb) + c / n * p.block : nullptr;
  V sums[kRows][kTaps];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int k = 0; k < kTaps; ++k) sums[r][k] = load(gw + (r * kTaps + k) * n, All{});
  }
  for (int row = 0; row < p.count; ++row) {
    const T* const at = static_cast<const T*>(p.g) + row * p.g_row + c;
    const void* const* const rows = p.x + row * kRows;
    for (std::int64_t column = 0; column < p.columns; column += kGradientTile) {
      const int outputs = static_cast<int>(min_of<std::int64_t>(p.columns - column, kGradientTile));
      V g[kGradientTile];
#pragma GCC unroll 8
      for (int j = 0; j < kGradientTile; ++j) {
        g[j] = j < outputs ? load(at + (column + j) * p.step, lanes) : V{};
      }
      if (gb) {
        V sum = load(gb, All{});
#pragma GCC unroll 8
        for (int j = 0; j < kGradientTile; ++j) sum += g[j];
        store(gb, sum, All{});
      }
      const std::int64_t first = p.first + column * kStride;
      if (first >= 0 && first + kColumns <= p.width) {
        add_tile<T, kTaps, kStride, kRows, true>(sums, g, p, rows, first, 0, c, lanes);
      } else {
        add_tile<T, kTaps, kStride, kRows, false>(sums, g, p, rows, first, (outputs - 1) * kStride + kTaps, c, lanes);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int k = 0; k < kTaps; ++k) store(gw + (r * kTaps + k) * n, sums[r][k], All{});
  }
}

// kRows or fewer rows of the filter.
template <class T, int kTaps, int kStride, int kRows>
void gradient_of_rows(int rows, const GradientRows& p) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return gradient_of_rows<T, kTaps, kStride, kRows - 1>(rows, p);
  }
  for_lanes<acc_t<T>>(p.channels, [&](std::int64_t c, auto lanes) SE_EXT_ALWAYS_INLINE {
    gradient_of_lanes<T, kTaps, kStride, kRows>(p, c, lanes);
  });
}

template <class T>
void gradient(int taps, int stride, int rows, const GradientRows& p) {
  switch (10 * stride + taps) {
    case 13:
      return gradient_of_rows<T, 3, 1, kRowsAtOnce<3>>(rows, p);
    case 15:
      return gradient_of_rows<T, 5, 1, kRowsAtOnce<5>>(rows, p);
    case 17:
      return gradient_of_rows<T, 7, 1, kRowsAtOnce<7>>(rows, p);
    case 23:
      return gradient_of_rows<T, 3, 2, kRowsAtOnce<3>>(rows, p);
    case 25:
      return gradient_of_rows<T, 5, 2, kRowsAtOnce<5>>(rows, p);
    case 27:
      return gradient_of_rows<T, 7, 2, kRowsAtOnce<7>>(rows, p);
  }
}

inline int rows_at_once(int taps) {
  return taps == 3 ? kRowsAtOnce<3> : taps == 5 ? kRowsAtOnce<5> : kRowsAtOnce<7>;
}

}  // namespace se_ext::cpu::SE_EXT_ISA
