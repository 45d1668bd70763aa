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
