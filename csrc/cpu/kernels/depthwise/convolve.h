// A row of a depthwise convolution: forward, and the input's gradient, which is a convolution with the weights turned
// round (of stride 1 onto every stride-th column, once for each of these).
//
// A tile of outputs is kept in registers, one register of channels each, through all rows of the filter. A column of x
// is loaded once per row and meets every tap: T + taps - 1 loads for T · taps multiplications at stride 1, beside
// `taps` loads of weights. Two loads and two multiplications a cycle make the multiplications the limit from three taps
// on. The columns of the next tile are asked for meanwhile: points lie `channels` apart, and the processor by itself
// asks too late. A block is in cache.
#pragma once

#include "../vec.h"
#include "kernels.h"

namespace se_ext::cpu::SE_EXT_ISA {

// The address of element `at` of x, as a number: it may lie outside of the map, where no pointer may be formed.
template <class T>
SE_EXT_INLINE std::uintptr_t address_of(const T* x, std::int64_t at) {
  return reinterpret_cast<std::uintptr_t>(x) + static_cast<std::uintptr_t>(at) * sizeof(T);
}

// The outputs [column, column + kTile) of the channels [c, c + lanes). kInside: all of them exist and read columns that
// exist; else `outputs` of them, and the columns of x that `inside` has a bit for. kStep: p.x_step where it is a
// constant, that of blocks; of maps 0.
template <class T, int kTaps, int kStride, int kTile, int kStep, bool kInside, class L>
SE_EXT_INLINE void convolve_tile(const ConvolveRow& p, std::int64_t c, std::int64_t column, int outputs,
                                 std::uint32_t inside, L lanes) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int n = kLanes<A>;
  constexpr int kColumns = (kTile - 1) * kStride + kTaps;
  static_assert(kColumns <= 32);
  V sums[kTile];
  const V start = p.bias ? load(static_cast<const A*>(p.bias) + c, All{}) : V{};
#pragma GCC unroll 16
  for (int j = 0; j < kTile; ++j) sums[j] = start;
  const std::int64_t step = kStep ? kStep : p.x_step;
  const std::int64_t at = (p.first + column * kStride) * step + c;
  const std::uintptr_t step_bytes = static_cast<std::uintptr_t>(step) * sizeof(T);
  for (int r = 0; r < p.count; ++r) {
    const std::uintptr_t x = address_of(static_cast<const T*>(p.rows[r].x), at);
    const A* w = static_cast<const A*>(p.rows[r].w) + c / n * p.block;
    V weights[kTaps];
#pragma GCC unroll 16
    for (int k = 0; k < kTaps; ++k) weights[k] = load(w + k * n, All{});
#pragma GCC unroll 32
    for (int q = 0; q < kColumns; ++q) {
      if (!kInside && !(inside >> q & 1)) continue;
      const V v = load(reinterpret_cast<const T*>(x + q * step_bytes), lanes);
      if (kInside && !kStep && q >= kTaps - kStride) {
        __builtin_prefetch(reinterpret_cast<const void*>(x + (q + kTile * kStride) * step_bytes));
      }
#pragma GCC unroll 16
      for (int k = 0; k < kTaps; ++k) {
        const int j = (q - k) / kStride;
        if (q >= k && (q - k) % kStride == 0 && j < kTile) sums[j] += v * weights[k];
      }
    }
  }
  T* y = static_cast<T*>(p.y) + column * p.y_step + c;
#pragma GCC unroll 16
  for (int j = 0; j < kTile; ++j) {
    if (kInside || j < outputs) store(y + j * p.y_step, sums[j], lanes);
  }
}

template <class T, int kTaps, int kStride, int kTile, int kStep>
void convolve_row(const ConvolveRow& p) {
  using A = acc_t<T>;
  constexpr int kColumns = (kTile - 1) * kStride + kTaps;
  for (std::int64_t column = 0; column < p.columns; column += kTile) {
    const int outputs = static_cast<int>(min_of<std::int64_t>(p.columns - column, kTile));
    const std::int64_t at = p.first + column * kStride;
    if (outputs == kTile && at >= 0 && at + kColumns <= p.width) {
      for_lanes<A>(p.channels, [&](std::int64_t c, auto lanes) SE_EXT_ALWAYS_INLINE {
        convolve_tile<T, kTaps, kStride, kTile, kStep, true>(p, c, column, kTile, 0, lanes);
      });
      continue;
    }
    const std::int64_t used = (outputs - 1) * kStride + kTaps;
    const std::int64_t begin = at < 0 ? min_of(-at, used) : 0, end = min_of(used, p.width - at);
    const std::uint32_t inside = end > begin ? ((1u << (end - begin)) - 1) << begin : 0;
    for_lanes<A>(p.channels, [&](std::int64_t c, auto lanes) SE_EXT_ALWAYS_INLINE {
      convolve_tile<T, kTaps, kStride, kTile, kStep, false>(p, c, column, outputs, inside, lanes);
    });
  }
}

template <class T, int kTile, int kStep>
void convolve_in_tiles(int taps, int stride, const ConvolveRow& p) {
  switch (stride == 1 ? taps : 10 + taps) {
    case 1:
      return convolve_row<T, 1, 1, kTile, kStep>(p);
    case 2:
      return convolve_row<T, 2, 1, kTile, kStep>(p);
    case 3:
      return convolve_row<T, 3, 1, kTile, kStep>(p);
    case 4:
      return convolve_row<T, 4, 1, kTile, kStep>(p);
    case 5:
      return convolve_row<T, 5, 1, kTile, kStep>(p);
    case 7:
      return convolve_row<T, 7, 1, kTile, kStep>(p);
    case 13:
      return convolve_row<T, 3, 2, kTile, kStep>(p);
    case 15:
      return convolve_row<T, 5, 2, kTile, kStep>(p);
    case 17:
      return convolve_row<T, 7, 2, kTile, kStep>(p);
  }
}

// In tiles of 7 or 8 columns, whichever leaves fewer over: the widths of networks are multiples of 7 (images of 224
// points) or of 8 (256), and eight sums hide the latency of a multiplication.
template <class T, int kStep>
void convolve_by_width(int taps, int stride, const ConvolveRow& p) {
  const auto computed = [&](std::int64_t tile) { return (p.columns + tile - 1) / tile * tile; };
  if (computed(7) < computed(8)) {
    convolve_in_tiles<T, 7, kStep>(taps, stride, p);
  } else {
    convolve_in_tiles<T, 8, kStep>(taps, stride, p);
  }
}

template <class T>
void convolve(int taps, int stride, const ConvolveRow& p) {
  convolve_by_width<T, 0>(taps, stride, p);
}

template <class A>
void convolve_block(int taps, int stride, const ConvolveRow& p) {
  convolve_by_width<A, kLanes<A>>(taps, stride, p);
}

}  // namespace se_ext::cpu::SE_EXT_ISA
