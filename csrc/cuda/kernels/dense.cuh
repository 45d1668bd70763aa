// The excitation's matrix products. A dot product is taken by `lanes` neighbours of a warp in an order that follows
// from its length and the weight's type alone, so that a sample's result is the same alone and in a batch, and in the
// kernel of the whole block.
#pragma once

#include "../tiling.h"
#include "activations.cuh"

namespace se_ext::cuda {

struct DotPlan {
  int access, lanes;

  DotPlan(std::int64_t length, DType type) : access(full_access(type)), lanes(1) {
    if (length % access != 0) access = 1;
    while (lanes < kWarp && length / access >= 4 * lanes) lanes *= 2;
  }
};

// weight · vectors[s] for `samples` vectors that lie `stride` apart, by `lanes` neighbours, all of which return the
// results. Weights and vectors are read 16 bytes at a time where n is more than one: they begin at multiples of n
// values. Every thread of the warp must come here.
template <int n, int samples, class W, class A>
SE_EXT_DEVICE Lanes<A, samples> dot(const W* weight, const A* vectors, std::int64_t stride, std::int64_t length,
                                    int lane_count) {
  const int lane = static_cast<int>(threadIdx.x) & (lane_count - 1);
  Lanes<A, n> sums[samples];
  SE_EXT_UNROLL
  for (int s = 0; s < samples; ++s) sums[s] = lanes<A, n>([](int) { return A(0); });
  for (std::int64_t i = lane * n; i < length; i += lane_count * n) {
    const Lanes<A, n> w = load<n>(weight + i);
    SE_EXT_UNROLL
    for (int s = 0; s < samples; ++s) {
      const Lanes<A, n> v = load<n>(vectors + s * stride + i);
      SE_EXT_UNROLL
      for (int j = 0; j < n; ++j) sums[s][j] = multiply_add(w[j], v[j], sums[s][j]);
    }
  }
  return lanes<A, samples>([&](int s) {
    SE_EXT_UNROLL
    for (int half = n / 2; half > 0; half /= 2) {
      SE_EXT_UNROLL
      for (int j = 0; j < half; ++j) sums[s][j] += sums[s][j + half];
    }
    A sum = sums[s][0];
    for (int mask = lane_count / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    return sum;
  });
}

// ---- the transposed weight: in the order that ../tiling.h defines ----

// kSide values, in one access where `whole`; else one by one, the last of `left` in place of those beyond it.
template <bool whole, class T>
SE_EXT_DEVICE Lanes<acc_t<T>, kSide> load_side(const T* from, std::int64_t left) {
  if constexpr (whole) {
    return load<kSide>(from);
  } else {
    return lanes<acc_t<T>, kSide>([&](int j) { return load<1>(from + (j < left ? j : left - 1))[0]; });
  }
}

// The groups that have pieces.
SE_EXT_HOST_DEVICE constexpr int piece_groups(std::int64_t rows) {
  return rows < kPieceGroups * kPieceRows ? static_cast<int>((rows + kPieceRows - 1) / kPieceRows) : kPieceGroups;
}

// The piece that begins at row `begin`, of kSide columns from `column` on, for several vectors. `whole`: rows and
// columns are multiples of kSide. kAhead rows are loaded before the first of them is used.
template <bool whole, int kAhead, int samples, class W, class A>
SE_EXT_DEVICE Lanes<Lanes<A, kSide>, samples> sum_piece(const W* weight, std::int64_t rows, std::int64_t columns,
                                                        std::int64_t begin, std::int64_t column,
                                                        const Lanes<const A*, samples>& vectors) {
  static_assert(kAhead % kSide == 0 && kPieceRows % kAhead == 0);
  Lanes<Lanes<A, kSide>, samples> sums;
  SE_EXT_UNROLL
  for (int s = 0; s < samples; ++s) sums[s] = lanes<A, kSide>([](int) { return A(0); });
  SE_EXT_UNROLL
  for (int start = 0; start < kPieceRows; start += kAhead) {
    Lanes<A, kSide> w[kAhead], grad[samples][kAhead / kSide];
    SE_EXT_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      const std::int64_t row = begin + start + k;
      if (row < rows) w[k] = load_side<whole>(weight + row * columns + column, columns - column);
    }
    SE_EXT_UNROLL
    for (int k = 0; k < kAhead / kSide; ++k) {
      const std::int64_t row = begin + start + k * kSide;
      if (row < rows) {
        SE_EXT_UNROLL
        for (int s = 0; s < samples; ++s) grad[s][k] = load_side<whole>(vectors[s] + row, rows - row);
      }
    }
    SE_EXT_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      if (begin + start + k < rows) {
        SE_EXT_UNROLL
        for (int s = 0; s < samples; ++s) {
          SE_EXT_UNROLL
          for (int j = 0; j < kSide; ++j) {
            sums[s][j] = multiply_add(grad[s][k / kSide][k % kSide], w[k][j], sums[s][j]);
          }
        }
      }
    }
  }
  return sums;
}

// f.template operator()<W, A>() with the types of a layer
template <class F>
cudaError_t with_weight_type(DType type, const F& f) {
  return with_type(type, [&]<class W>(W) { return f.template operator()<W, acc_t<W>>(); });
}

template <class A>
SE_EXT_DEVICE A activate_one(Activation a, A value) {
  Lanes<A, 1> v{{value}};
  activate<false>(Any(a), v);
  return v[0];
}

template <class A>
SE_EXT_DEVICE A gradient_one(Activation a, A grad, A input, A output) {
  Lanes<A, 1> g{{grad}};
  const Lanes<A, 1> in{{input}}, out{{output}};
  multiply_by_slope<false>(Any(a), g, in, out);
  return g[0];
}

}  // namespace se_ext::cuda
