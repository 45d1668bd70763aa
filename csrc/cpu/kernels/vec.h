// The vector vocabulary of the kernels: one register of float or double lanes, and loads and stores that convert
// from and to the stored type. Compiled once per instruction set, inside that set's own namespace.
//
// It is built on the compiler's vector extensions (GCC and Clang) rather than on at::vec, because at::vec pulls in
// c10's inline functions: compiled for AVX-512 they would be weak symbols that the linker may pick for everybody.
#pragma once

#include <cstdint>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define SE_EXT_ALWAYS_INLINE __attribute__((always_inline))
#define SE_EXT_INLINE static inline SE_EXT_ALWAYS_INLINE

namespace se_ext::cpu::SE_EXT_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

typedef float vfloat __attribute__((vector_size(kVectorBytes)));
typedef double vdouble __attribute__((vector_size(kVectorBytes)));
typedef std::int32_t vint32 __attribute__((vector_size(kVectorBytes)));
typedef std::int64_t vint64 __attribute__((vector_size(kVectorBytes)));
typedef std::uint32_t vuint32 __attribute__((vector_size(kVectorBytes)));
typedef std::uint16_t vuint16 __attribute__((vector_size(kVectorBytes / 2)));

struct bfloat16 {
  std::uint16_t bits;
};
struct float16 {
  std::uint16_t bits;
};

// The type that a stored type is summed in.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulate<T>::type;

template <class A>
struct Register;
template <>
struct Register<float> {
  using type = vfloat;
  using integer = vint32;
};
template <>
struct Register<double> {
  using type = vdouble;
  using integer = vint64;
};
template <class A>
using Vec = typename Register<A>::type;
template <class A>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

// Which lanes a load or store touches. The tail of a loop calls the body's function with First.
struct All {};
struct First {
  int count;
};

template <class A>
SE_EXT_INLINE Vec<A> broadcast(A value) {
  return value - Vec<A>{};
}

template <class To, class From>
SE_EXT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// ---- raw registers: whole, and the first n lanes (the others read as zero) ----

template <class V, class E>
SE_EXT_INLINE V load_raw(const E* p, All) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class E>
SE_EXT_INLINE void store_raw(E* p, V v, All) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class V, class E>
SE_EXT_INLINE V load_lanes(const E* p, int count) {
  V v{};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

template <class V, class E>
SE_EXT_INLINE void store_lanes(E* p, V v, int count) {
  for (int i = 0; i < count; ++i) p[i] = v[i];
}

#if defined(__AVX512F__)

SE_EXT_INLINE vfloat load_first(const float* p, First f) {
  return (vfloat)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << f.count) - 1), p);
}
SE_EXT_INLINE vdouble load_first(const double* p, First f) {
  return (vdouble)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << f.count) - 1), p);
}
SE_EXT_INLINE vuint16 load_first(const std::uint16_t* p, First f) {
  return (vuint16)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << f.count) - 1), p);
}
SE_EXT_INLINE void store_first(float* p, vfloat v, First f) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << f.count) - 1), (__m512)v);
}
SE_EXT_INLINE void store_first(double* p, vdouble v, First f) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << f.count) - 1), (__m512d)v);
}
SE_EXT_INLINE void store_first(std::uint16_t* p, vuint16 v, First f) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << f.count) - 1), (__m256i)v);
}

#elif defined(__AVX2__)

SE_EXT_INLINE __m256i first_mask32(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
SE_EXT_INLINE __m256i first_mask64(int count) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
SE_EXT_INLINE vfloat load_first(const float* p, First f) {
  return (vfloat)_mm256_maskload_ps(p, first_mask32(f.count));
}
SE_EXT_INLINE vdouble load_first(const double* p, First f) {
  return (vdouble)_mm256_maskload_pd(p, first_mask64(f.count));
}
SE_EXT_INLINE vuint16 load_first(const std::uint16_t* p, First f) {
  return load_lanes<vuint16>(p, f.count);
}
SE_EXT_INLINE void store_first(float* p, vfloat v, First f) {
  _mm256_maskstore_ps(p, first_mask32(f.count), (__m256)v);
}
SE_EXT_INLINE void store_first(double* p, vdouble v, First f) {
  _mm256_maskstore_pd(p, first_mask64(f.count), (__m256d)v);
}
SE_EXT_INLINE void store_first(std::uint16_t* p, vuint16 v, First f) {
  store_lanes(p, v, f.count);
}

#else

SE_EXT_INLINE vfloat load_first(const float* p, First f) {
  return load_lanes<vfloat>(p, f.count);
}
SE_EXT_INLINE vdouble load_first(const double* p, First f) {
  return load_lanes<vdouble>(p, f.count);
}
SE_EXT_INLINE vuint16 load_first(const std::uint16_t* p, First f) {
  return load_lanes<vuint16>(p, f.count);
}
SE_EXT_INLINE void store_first(float* p, vfloat v, First f) {
  store_lanes(p, v, f.count);
}
SE_EXT_INLINE void store_first(double* p, vdouble v, First f) {
  store_lanes(p, v, f.count);
}
SE_EXT_INLINE void store_first(std::uint16_t* p, vuint16 v, First f) {
  store_lanes(p, v, f.count);
}

#endif

template <class V, class E>
SE_EXT_INLINE V load_raw(const E* p, First f) {
  return load_first(p, f);
}
template <class V, class E>
SE_EXT_INLINE void store_raw(E* p, V v, First f) {
  store_first(p, v, f);
}

// ---- conversions of the half types ----

SE_EXT_INLINE vfloat widen_bfloat16(vuint16 h) {
  return bit_cast<vfloat>(__builtin_convertvector(h, vuint32) << 16);
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
SE_EXT_INLINE vuint16 narrow_bfloat16(vfloat v) {
  const vuint32 u = bit_cast<vuint32>(v);
  const vuint32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vuint32 quiet = (u >> 16) | 0x40u;
  return __builtin_convertvector(v != v ? quiet : rounded, vuint16);
}

#if defined(__AVX512F__)
SE_EXT_INLINE vfloat widen_float16(vuint16 h) {
  return (vfloat)_mm512_cvtph_ps((__m256i)h);
}
SE_EXT_INLINE vuint16 narrow_float16(vfloat v) {
  return (vuint16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__F16C__)
SE_EXT_INLINE vfloat widen_float16(vuint16 h) {
  return (vfloat)_mm256_cvtph_ps((__m128i)h);
}
SE_EXT_INLINE vuint16 narrow_float16(vfloat v) {
  return (vuint16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
// Exponents differ by 112: shift the bits into place and let a multiplication by 2^112 rebase them, which also
// normalises subnormals. What was an infinity or a NaN then lies at 2^16 and above and gets the full exponent.
SE_EXT_INLINE vfloat widen_float16(vuint16 h) {
  const vuint32 u = __builtin_convertvector(h, vuint32);
  const vuint32 magnitude = (u & 0x7fffu) << 13;
  const vfloat rebased = bit_cast<vfloat>(magnitude) * 0x1p112f;
  const vuint32 bits = bit_cast<vuint32>(rebased);
  const vuint32 special = bits | 0x7f800000u;
  return bit_cast<vfloat>((rebased >= 65536.0f ? special : bits) | ((u & 0x8000u) << 16));
}
// Round to nearest, ties to even. Adding 2^(e+13) (normal) or 0.5 (subnormal) aligns the last kept bit with the
// register's own rounding.
SE_EXT_INLINE vuint16 narrow_float16(vfloat v) {
  const vuint32 u = bit_cast<vuint32>(v);
  const vuint32 sign = (u >> 16) & 0x8000u;
  const vuint32 magnitude = u & 0x7fffffffu;
  const vfloat a = bit_cast<vfloat>(magnitude);
  const vuint32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const vuint32 subnormal = bit_cast<vuint32>(a + 0.5f) - 0x3f000000u;
  vuint32 r = a < 0x1p-14f ? subnormal : normal;
  r = a >= 65520.0f ? vuint32{} + 0x7c00u : r;
  r = a != a ? ((magnitude >> 13) & 0x3ffu) | 0x7e00u : r;
  return __builtin_convertvector(r | sign, vuint16);
}
#endif

// ---- load and store of the stored types, in the accumulation type ----

template <class L>
SE_EXT_INLINE vfloat load(const float* p, L lanes) {
  return load_raw<vfloat>(p, lanes);
}
template <class L>
SE_EXT_INLINE vdouble load(const double* p, L lanes) {
  return load_raw<vdouble>(p, lanes);
}
template <class L>
SE_EXT_INLINE vfloat load(const bfloat16* p, L lanes) {
  return widen_bfloat16(load_raw<vuint16>(&p->bits, lanes));
}
template <class L>
SE_EXT_INLINE vfloat load(const float16* p, L lanes) {
  return widen_float16(load_raw<vuint16>(&p->bits, lanes));
}
template <class L>
SE_EXT_INLINE void store(float* p, vfloat v, L lanes) {
  store_raw(p, v, lanes);
}
template <class L>
SE_EXT_INLINE void store(double* p, vdouble v, L lanes) {
  store_raw(p, v, lanes);
}
template <class L>
SE_EXT_INLINE void store(bfloat16* p, vfloat v, L lanes) {
  store_raw(&p->bits, narrow_bfloat16(v), lanes);
}
template <class L>
SE_EXT_INLINE void store(float16* p, vfloat v, L lanes) {
  store_raw(&p->bits, narrow_float16(v), lanes);
}

// One stored value, in the accumulation type.
SE_EXT_INLINE float load_one(const float* p) {
  return *p;
}
SE_EXT_INLINE double load_one(const double* p) {
  return *p;
}
SE_EXT_INLINE float load_one(const bfloat16* p) {
  return load(p, First{1})[0];
}
SE_EXT_INLINE float load_one(const float16* p) {
  return load(p, First{1})[0];
}

// ---- sums over a register's lanes ----

// sums[i] = Σ over the lanes of v[i], for four registers together: short rows spend much of their time here. The order
// of the additions is the same for every register, and sum_lanes of one register is defined by it.
#if defined(__AVX2__)
SE_EXT_INLINE void sum_lanes_of_four(const vfloat* v, float* sums) {
  __m256 r[4];
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
    r[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[i]), _mm512_extractf32x8_ps((__m512)v[i], 1));
#else
    r[i] = (__m256)v[i];
#endif
  }
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(r[0], r[1]), _mm256_hadd_ps(r[2], r[3]));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}
SE_EXT_INLINE float sum_lanes(vfloat v) {
  const vfloat four[4] = {v};
  float sums[4];
  sum_lanes_of_four(four, sums);
  return sums[0];
}
#else
SE_EXT_INLINE float sum_lanes(vfloat v) {
  float sum = v[0];
  for (int i = 1; i < kLanes<float>; ++i) sum += v[i];
  return sum;
}
SE_EXT_INLINE void sum_lanes_of_four(const vfloat* v, float* sums) {
  for (int i = 0; i < 4; ++i) sums[i] = sum_lanes(v[i]);
}
#endif
SE_EXT_INLINE double sum_lanes(vdouble v) {
  double sum = v[0];
  for (int i = 1; i < kLanes<double>; ++i) sum += v[i];
  return sum;
}
SE_EXT_INLINE void sum_lanes_of_four(const vdouble* v, double* sums) {
  for (int i = 0; i < 4; ++i) sums[i] = sum_lanes(v[i]);
}

template <class A>
SE_EXT_INLINE typename Register<A>::integer lane_index() {
  typename Register<A>::integer lane{};
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = i;
  return lane;
}

// a in the first lanes, b in the others.
SE_EXT_INLINE vfloat select(First f, vfloat a, vfloat b) {
  return lane_index<float>() < f.count ? a : b;
}
SE_EXT_INLINE vdouble select(First f, vdouble a, vdouble b) {
  return lane_index<double>() < static_cast<std::int64_t>(f.count) ? a : b;
}

template <class I>
SE_EXT_INLINE I min_of(I a, I b) {
  return a < b ? a : b;
}

// Calls f(i, All{}) for whole registers in [0, count) and f(i, First{rest}) for what remains.
template <class A, class F>
SE_EXT_INLINE void for_lanes(std::int64_t count, F&& f) {
  std::int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) f(i, All{});
  if (i < count) f(i, First{static_cast<int>(count - i)});
}

}  // namespace se_ext::cpu::SE_EXT_ISA
