// The small matrix products of the excitation. Each result element is summed in an order that depends on the summed
// length alone, so a sample's result is the same in any batch and for any split of the rows among threads.
#pragma once

#include "activations.h"
#include "kernels.h"
#include "vec.h"

namespace se_ext::cpu::SE_EXT_ISA {

// Rows of one block of dot products: its sums, and what is loaded beside them, fill the registers.
inline constexpr int kDotRows = kVectorBytes == 64 ? 4 : 3;

// out[b, r] = Σ_k w[r, k] in[b, k] + bias[r] for kRows rows and kSamples samples, each weight loaded once.
template <int kRows, int kSamples, class T, class A>
SE_EXT_INLINE void dot_block(std::int64_t columns, const T* w, const T* bias, const A* in, A* out,
                             std::int64_t out_stride) {
  Vec<A> acc[kRows][kSamples] = {};
  for_lanes<A>(columns, [&](std::int64_t k, auto lanes) SE_EXT_ALWAYS_INLINE {
    Vec<A> weight[kRows];
    for (int r = 0; r < kRows; ++r) weight[r] = load(w + r * columns + k, lanes);
    for (int b = 0; b < kSamples; ++b) {
      const Vec<A> z = load(in + b * columns + k, lanes);
      for (int r = 0; r < kRows; ++r) acc[r][b] += weight[r] * z;
    }
  });
  A sums[kRows * kSamples];
  constexpr int kWhole = kRows * kSamples / 4 * 4;
  for (int i = 0; i < kWhole; i += 4) sum_lanes_of_four(&acc[0][0] + i, sums + i);
  for (int i = kWhole; i < kRows * kSamples; ++i) sums[i] = sum_lanes((&acc[0][0])[i]);
  for (int r = 0; r < kRows; ++r) {
    const A offset = bias ? load_one(bias + r) : A(0);
    for (int b = 0; b < kSamples; ++b) out[b * out_stride + r] = sums[r * kSamples + b] + offset;
  }
}

// out [samples, rows] = in [samples, columns] · wᵀ + bias for a wide w: dot products, lanes over the columns. A few
// rows of w at a time meet all samples, so that w, the larger of the two, is read from far once.
template <class T, class A>
SE_EXT_INLINE void matvec_wide(std::int64_t samples, std::int64_t rows, std::int64_t columns, const T* w, const T* bias,
                               const A* in, A* out, std::int64_t begin, std::int64_t end) {
  const auto block = [&]<int kRows>(std::int64_t r) SE_EXT_ALWAYS_INLINE {
    const auto of = [&]<int kSamples>(std::int64_t n) SE_EXT_ALWAYS_INLINE {
      dot_block<kRows, kSamples>(columns, w + r * columns, bias ? bias + r : nullptr, in + n * columns,
                                 out + n * rows + r, rows);
    };
    std::int64_t n = 0;
    for (; n + kSamplesAtOnce <= samples; n += kSamplesAtOnce) of.template operator()<kSamplesAtOnce>(n);
    for (; n < samples; ++n) of.template operator()<1>(n);
  };
  std::int64_t r = begin;
  for (; r + kDotRows <= end; r += kDotRows) block.template operator()<kDotRows>(r);
  for (; r < end; ++r) block.template operator()<1>(r);
}

// A register of rows of w, `count` of which are there: f(k, column) for every column in order, as a register of rows.
template <class A, class T, class F>
SE_EXT_INLINE void for_each_column(std::int64_t columns, const T* w, std::int64_t count, const F& f) {
  constexpr int L = kLanes<A>;
  const auto square = [&](std::int64_t k, auto lanes) SE_EXT_ALWAYS_INLINE {
    Vec<A> v[L];
    for (int i = 0; i < L; ++i) v[i] = i < count ? load(w + i * columns + k, lanes) : Vec<A>{};
    transpose<A>(v);
    for (int i = 0; i < L; ++i) {
      if (k + i < columns) f(k + i, v[i]);
    }
  };
  for_lanes<A>(columns, square);
}

inline constexpr std::int64_t kShortColumns = 32;

// The same product for a tall w of at most kShortColumns columns: lanes over the rows, columns in order. Dot products
// as short as that would spend their time adding up lanes. w is transposed a few rows at a time.
template <class T, class A>
SE_EXT_INLINE void matvec_tall(std::int64_t samples, std::int64_t rows, std::int64_t columns, const T* w, const T* bias,
                               const A* in, A* out, std::int64_t begin, std::int64_t end) {
  constexpr int L = kLanes<A>;
  const auto start = [&](std::int64_t r, auto lanes)
                         SE_EXT_ALWAYS_INLINE { return bias ? load(bias + r, lanes) : Vec<A>{}; };
  const auto block = [&]<int kWidth>(std::int64_t r, std::int64_t count, auto lanes) SE_EXT_ALWAYS_INLINE {
    alignas(64) A panel[kShortColumns * kWidth * L];  // [columns, kWidth registers of rows]
    for (int i = 0; i < kWidth; ++i) {
      for_each_column<A>(columns, w + (r + i * L) * columns, count,
                         [&](std::int64_t k, Vec<A> weight)
                             SE_EXT_ALWAYS_INLINE { store(panel + (k * kWidth + i) * L, weight, All{}); });
    }
    const auto of = [&]<int kSamples>(std::int64_t n) SE_EXT_ALWAYS_INLINE {
      Vec<A> acc[kSamples][kWidth];
      for (int i = 0; i < kWidth; ++i) {
        for (int b = 0; b < kSamples; ++b) acc[b][i] = start(r + i * L, lanes);
      }
      for (std::int64_t k = 0; k < columns; ++k) {
        for (int i = 0; i < kWidth; ++i) {
          const Vec<A> weight = load(panel + (k * kWidth + i) * L, All{});
          for (int b = 0; b < kSamples; ++b) acc[b][i] += in[(n + b) * columns + k] * weight;
        }
      }
      for (int b = 0; b < kSamples; ++b) {
        for (int i = 0; i < kWidth; ++i) store(out + (n + b) * rows + r + i * L, acc[b][i], lanes);
      }
    };
    std::int64_t n = 0;
    for (; n + kSamplesAtOnce <= samples; n += kSamplesAtOnce) of.template operator()<kSamplesAtOnce>(n);
    for (; n < samples; ++n) of.template operator()<1>(n);
  };
  const auto one_sample = [&](std::int64_t r, std::int64_t count, auto lanes) SE_EXT_ALWAYS_INLINE {
    Vec<A> acc = start(r, lanes);
    for_each_column<A>(columns, w + r * columns, count,
                       [&](std::int64_t k, Vec<A> weight) SE_EXT_ALWAYS_INLINE { acc += in[k] * weight; });
    store(out + r, acc, lanes);
  };
  std::int64_t r = begin;
  if (samples > 1) {
    for (; r + 2 * L <= end; r += 2 * L) block.template operator()<2>(r, L, All{});
  }
  const auto last = [&](std::int64_t count, auto lanes) SE_EXT_ALWAYS_INLINE {
    if (samples > 1) {
      block.template operator()<1>(r, count, lanes);
    } else if (samples == 1) {
      one_sample(r, count, lanes);
    }
  };
  for (; r + L <= end; r += L) last(L, All{});
  if (r < end) last(end - r, First{static_cast<int>(end - r)});
}

// out [samples, rows] = in [samples, columns] · wᵀ + bias, w [rows, columns]; only rows [begin, end).
template <class T>
void matvec(std::int64_t samples, std::int64_t rows, std::int64_t columns, const void* w_data, const void* bias_data,
            const void* in_data, void* out_data, std::int64_t begin, std::int64_t end) {
  using A = acc_t<T>;
  const T* w = static_cast<const T*>(w_data);
  const T* bias = static_cast<const T*>(bias_data);
  const A* in = static_cast<const A*>(in_data);
  A* out = static_cast<A*>(out_data);
  if (rows > columns && columns <= kShortColumns) {
    matvec_tall(samples, rows, columns, w, bias, in, out, begin, end);
  } else {
    matvec_wide(samples, rows, columns, w, bias, in, out, begin, end);
  }
}

// kSamples samples and kRegisters registers of columns: out[b, k] = Σ_r in[b, r] w[r, k], rows in order.
template <int kSamples, int kRegisters, class T, class A, class L>
SE_EXT_INLINE void combine_block(std::int64_t rows, std::int64_t columns, const T* w, const A* in, A* out, L lanes) {
  Vec<A> acc[kSamples][kRegisters] = {};
  for (std::int64_t r = 0; r < rows; ++r) {
    for (int k = 0; k < kRegisters; ++k) {
      const Vec<A> weight = load(w + r * columns + k * kLanes<A>, lanes);
      for (int b = 0; b < kSamples; ++b) acc[b][k] += in[b * rows + r] * weight;
    }
  }
  for (int b = 0; b < kSamples; ++b) {
    for (int k = 0; k < kRegisters; ++k) store(out + b * columns + k * kLanes<A>, acc[b][k], lanes);
  }
}

// out [samples, columns] = in [samples, rows] · w, w [rows, columns]; only columns [begin, end). A few columns of w at
// a time meet all samples.
template <class T>
void vecmat(std::int64_t samples, std::int64_t rows, std::int64_t columns, const void* w_data, const void* in_data,
            void* out_data, std::int64_t begin, std::int64_t end) {
  using A = acc_t<T>;
  constexpr int kRegisters = 2;
  constexpr std::int64_t kWide = kRegisters * kLanes<A>;
  const T* w = static_cast<const T*>(w_data);
  const A* in = static_cast<const A*>(in_data);
  A* out = static_cast<A*>(out_data);
  const auto band = [&]<int kWidth>(std::int64_t k, auto lanes) SE_EXT_ALWAYS_INLINE {
    std::int64_t n = 0;
    for (; n + kSamplesAtOnce <= samples; n += kSamplesAtOnce) {
      combine_block<kSamplesAtOnce, kWidth>(rows, columns, w + k, in + n * rows, out + n * columns + k, lanes);
    }
    for (; n < samples; ++n) {
      combine_block<1, kWidth>(rows, columns, w + k, in + n * rows, out + n * columns + k, lanes);
    }
  };
  std::int64_t k = begin;
  for (; k + kWide <= end; k += kWide) band.template operator()<kRegisters>(k, All{});
  for_lanes<A>(end - k,
               [&](std::int64_t i, auto lanes) SE_EXT_ALWAYS_INLINE { band.template operator()<1>(k + i, lanes); });
}

// Some columns of a [samples, columns] matrix, samples `stride` apart. Those of a matrix larger than the first-level
// cache are copied next to each other: in place they often lie a power of two apart and push each other out of it.
template <class A, int kWidth>
class Panel {
 public:
  static bool is_copied(std::int64_t samples, std::int64_t columns) {
    return samples <= kMostCopied && samples * columns * static_cast<std::int64_t>(sizeof(A)) > kCacheBytes;
  }

  SE_EXT_ALWAYS_INLINE Panel(const A* from, std::int64_t samples, std::int64_t columns, std::int64_t width)
      : data(from), stride(columns) {
    if (!is_copied(samples, columns)) return;
    for (std::int64_t n = 0; n < samples; ++n) {
      for (std::int64_t i = 0; i < width; ++i) copy_[n * kWidth + i] = from[n * columns + i];
    }
    data = copy_;
    stride = kWidth;
  }
  Panel(const Panel&) = delete;

  const A* data;
  std::int64_t stride;

 private:
  static constexpr std::int64_t kMostCopied = 64;
  static constexpr std::int64_t kCacheBytes = 32 * 1024;
  alignas(64) A copy_[kMostCopied * kWidth];
};

// kRows rows and kRegisters registers of columns of out = aᵀ · b, samples in order.
template <int kRows, int kRegisters, class T, class A, class L, class Rows, class Columns>
SE_EXT_INLINE void outer_block(std::int64_t samples, const Rows& a, std::int64_t r, const Columns& b, T* out,
                               std::int64_t out_stride, L lanes) {
  Vec<A> acc[kRows][kRegisters] = {};
  for (std::int64_t n = 0; n < samples; ++n) {
    Vec<A> right[kRegisters];
    for (int k = 0; k < kRegisters; ++k) right[k] = load(b.data + n * b.stride + k * kLanes<A>, lanes);
    for (int i = 0; i < kRows; ++i) {
      for (int k = 0; k < kRegisters; ++k) acc[i][k] += a.data[n * a.stride + r + i] * right[k];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int k = 0; k < kRegisters; ++k) store(out + i * out_stride + k * kLanes<A>, acc[i][k], lanes);
  }
}

// out [rows, columns] = aᵀ · b, a [samples, rows], b [samples, columns], samples in order; only rows [begin, end).
template <class T>
void outer(std::int64_t samples, std::int64_t rows, std::int64_t columns, const void* a_data, const void* b_data,
           void* out_data, std::int64_t begin, std::int64_t end) {
  using A = acc_t<T>;
  constexpr int kRows = 6, kRegisters = 2;  // their sums and what is loaded beside them fill the registers of AVX2
  constexpr int kRowsAtOnce = 8 * kRows, kWide = kRegisters * kLanes<A>;
  const A* a = static_cast<const A*>(a_data);
  const A* b = static_cast<const A*>(b_data);
  T* out = static_cast<T*>(out_data);
  // A copied panel of b meets many rows; else whole rows of out are written one after the other.
  const std::int64_t at_once = Panel<A, kWide>::is_copied(samples, columns) ? kRowsAtOnce : kRows;
  for (std::int64_t first = begin; first < end; first += at_once) {
    const std::int64_t count = min_of<std::int64_t>(at_once, end - first);
    const Panel<A, kRowsAtOnce> left(a + first, samples, rows, count);
    const auto band = [&]<int kWidth>(std::int64_t k, const auto& right, auto lanes) SE_EXT_ALWAYS_INLINE {
      T* to = out + first * columns + k;
      std::int64_t r = 0;
      for (; r + kRows <= count; r += kRows) {
        outer_block<kRows, kWidth, T, A>(samples, left, r, right, to + r * columns, columns, lanes);
      }
      for (; r < count; ++r) outer_block<1, kWidth, T, A>(samples, left, r, right, to + r * columns, columns, lanes);
    };
    std::int64_t k = 0;
    for (; k + kWide <= columns; k += kWide) {
      band.template operator()<kRegisters>(k, Panel<A, kWide>(b + k, samples, columns, kWide), All{});
    }
    if (k + kLanes<A> <= columns) {
      band.template operator()<1>(k, Panel<A, kWide>(b + k, samples, columns, kLanes<A>), All{});
      k += kLanes<A>;
    }
    if (k < columns) {
      const First rest{static_cast<int>(columns - k)};
      band.template operator()<1>(k, Panel<A, kWide>(b + k, samples, columns, rest.count), rest);
    }
  }
}

// out [columns] = Σ_n a[n, :], samples in order: the gradient of a bias.
template <class T>
void sum_samples(std::int64_t samples, std::int64_t columns, const void* a_data, void* out_data) {
  using A = acc_t<T>;
  const A* a = static_cast<const A*>(a_data);
  T* out = static_cast<T*>(out_data);
  for_lanes<A>(columns, [&](std::int64_t k, auto lanes) {
    Vec<A> sum{};
    for (std::int64_t n = 0; n < samples; ++n) sum += load(a + n * columns + k, lanes);
    store(out + k, sum, lanes);
  });
}

// sums[c] += Σ_r rows[r, c], rows in order.
template <class A>
void add_rows(std::int64_t count, std::int64_t channels, const void* rows_data, void* sums_data) {
  const A* rows = static_cast<const A*>(rows_data);
  A* sums = static_cast<A*>(sums_data);
  for_lanes<A>(channels, [&](std::int64_t c, auto lanes) {
    Vec<A> total = load(sums + c, lanes);
    for (std::int64_t r = 0; r < count; ++r) total += load(rows + r * channels + c, lanes);
    store(sums + c, total, lanes);
  });
}

// values /= divisor, in place; by zero as IEEE has it: an empty mean is NaN.
template <class A>
void divide(std::int64_t count, std::int64_t divisor, void* values_data) {
  if (divisor == 1) return;
  A* values = static_cast<A*>(values_data);
  for_lanes<A>(count, [&](std::int64_t i, auto lanes) {
    store(values + i, load(values + i, lanes) / static_cast<A>(divisor), lanes);
  });
}

// out = activation(in); out may be in.
template <class A>
void activation_forward(Activation activation, std::int64_t count, const void* in_data, void* out_data) {
  const A* in = static_cast<const A*>(in_data);
  A* out = static_cast<A*>(out_data);
  dispatch(activation, [&](auto of) {
    for_lanes<A>(count,
                 [&](std::int64_t i, auto lanes) { store(out + i, activate<of.value>(load(in + i, lanes)), lanes); });
  });
}

// out = grad ⊙ activation'(·), given the activation's output where its slope follows from that, its input elsewhere;
// out may be grad.
template <class A>
void activation_backward(Activation activation, std::int64_t count, const void* grad_data, const void* at_data,
                         void* out_data) {
  const A* grad = static_cast<const A*>(grad_data);
  const A* at = static_cast<const A*>(at_data);
  A* out = static_cast<A*>(out_data);
  dispatch(activation, [&](auto of) {
    for_lanes<A>(count, [&](std::int64_t i, auto lanes) {
      store(out + i, gradient<of.value>(load(grad + i, lanes), load(at + i, lanes)), lanes);
    });
  });
}

}  // namespace se_ext::cpu::SE_EXT_ISA
