// Values of the map in registers: loaded as they lie in memory, computed on in the accumulation type.
#pragma once

#include <cmath>
#include <cstring>

#include "../../params.h"
#include "platform.cuh"

namespace se_ext::cuda {

struct bfloat16 {
  std::uint16_t bits;
};
struct float16 {
  std::uint16_t bits;
};

template <class T>
struct Type {
  using accumulator = float;
};
template <>
struct Type<double> {
  using accumulator = double;
};
template <class T>
using acc_t = typename Type<T>::accumulator;

// Half types may be computed on with errors far below their own.
template <class T>
inline constexpr bool kIsHalf = sizeof(T) == 2;

template <class T>
inline constexpr int kFull = 16 / static_cast<int>(sizeof(T));

template <class A, int n>
struct Lanes {
  A at[n];
  SE_EXT_DEVICE A& operator[](int i) { return at[i]; }
  SE_EXT_DEVICE const A& operator[](int i) const { return at[i]; }
};

// f(0), …, f(n - 1) as lanes
template <class A, int n, class F>
SE_EXT_DEVICE Lanes<A, n> lanes(const F& f) {
  Lanes<A, n> out;
  SE_EXT_UNROLL
  for (int j = 0; j < n; ++j) out[j] = f(j);
  return out;
}

// `part` of the lanes, from `first` on
template <int part, class A, int n>
SE_EXT_DEVICE Lanes<A, part> slice(const Lanes<A, n>& of, int first) {
  return lanes<A, part>([&](int j) { return of[first + j]; });
}

SE_EXT_DEVICE float multiply_add(float a, float b, float c) {
  return fmaf(a, b, c);
}
SE_EXT_DEVICE double multiply_add(double a, double b, double c) {
  return fma(a, b, c);
}

template <int bytes>
struct Word;
template <>
struct Word<2> {
  using type = std::uint16_t;
};
template <>
struct Word<4> {
  using type = std::uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// n values as they lie in memory: one access of up to 16 bytes, or two of 16, aligned to its size.
template <class T, int n>
struct Raw {
  static constexpr int kBytes = n * static_cast<int>(sizeof(T));
  static constexpr int kAccess = kBytes < 16 ? kBytes : 16;
  using Access = typename Word<kAccess>::type;
  Access words[kBytes / kAccess];
};

template <int n, class T>
SE_EXT_DEVICE Raw<T, n> load_raw(const T* from) {
  using R = Raw<T, n>;
  R raw;
  SE_EXT_UNROLL
  for (int i = 0; i < R::kBytes / R::kAccess; ++i) {
    raw.words[i] = reinterpret_cast<const typename R::Access*>(from)[i];
  }
  return raw;
}

template <int part, class T, int n>
SE_EXT_DEVICE Raw<T, part> slice(const Raw<T, n>& of, int first) {
  Raw<T, part> out;
  memcpy(&out, reinterpret_cast<const char*>(&of) + first * sizeof(T), sizeof out);
  return out;
}

template <int n>
SE_EXT_DEVICE Lanes<float, n> widen(const Raw<float, n>& raw) {
  Lanes<float, n> out;
  memcpy(&out, &raw, sizeof out);
  return out;
}
template <int n>
SE_EXT_DEVICE Lanes<double, n> widen(const Raw<double, n>& raw) {
  Lanes<double, n> out;
  memcpy(&out, &raw, sizeof out);
  return out;
}
template <int n>
SE_EXT_DEVICE Lanes<float, n> widen(const Raw<bfloat16, n>& raw) {
  std::uint16_t bits[n];
  memcpy(bits, &raw, sizeof bits);
  return lanes<float, n>([&](int j) { return bits_to_float(static_cast<std::uint32_t>(bits[j]) << 16); });
}
template <int n>
SE_EXT_DEVICE Lanes<float, n> widen(const Raw<float16, n>& raw) {
  std::uint16_t bits[n];
  memcpy(bits, &raw, sizeof bits);
  return lanes<float, n>([&](int j) { return half_to_float(bits[j]); });
}

template <int n, class T>
SE_EXT_DEVICE Lanes<acc_t<T>, n> load(const T* from) {
  return widen<n>(load_raw<n>(from));
}

SE_EXT_DEVICE std::uint32_t narrow2(float first, float second, bfloat16*) {
  return float_to_bfloat162(first, second);
}
SE_EXT_DEVICE std::uint32_t narrow2(float first, float second, float16*) {
  return float_to_half2(first, second);
}

// Stores n values in one access of up to 16 bytes, or two of 16, aligned to its size; past the caches where `streaming`
// and 16 bytes wide.
template <class T, class A, int n>
SE_EXT_DEVICE void store(T* to, const Lanes<A, n>& values, bool streaming = false) {
  using R = Raw<T, n>;
  R raw;
  if constexpr (!kIsHalf<T>) {
    static_assert(sizeof raw == sizeof values);
    memcpy(&raw, &values, sizeof raw);
  } else if constexpr (n == 1) {
    raw.words[0] = static_cast<std::uint16_t>(narrow2(values[0], values[0], static_cast<T*>(nullptr)));
  } else {
    std::uint32_t pairs[n / 2];
    SE_EXT_UNROLL
    for (int j = 0; j < n / 2; ++j) pairs[j] = narrow2(values[2 * j], values[2 * j + 1], static_cast<T*>(nullptr));
    memcpy(&raw, pairs, sizeof raw);
  }
  auto* access = reinterpret_cast<typename R::Access*>(to);
  SE_EXT_UNROLL
  for (int i = 0; i < R::kBytes / R::kAccess; ++i) {
    if constexpr (R::kAccess == 16) {
      if (streaming) {
        store_streaming(access + i, raw.words[i]);
        continue;
      }
    }
    access[i] = raw.words[i];
  }
}

// f(T{}) with the C++ type of a dtype
template <class F>
auto with_type(DType type, const F& f) {
  switch (type) {
    case DType::Float32:
      return f(float{});
    case DType::Float64:
      return f(double{});
    case DType::BFloat16:
      return f(bfloat16{});
    default:
      return f(float16{});
  }
}

}  // namespace se_ext::cuda
