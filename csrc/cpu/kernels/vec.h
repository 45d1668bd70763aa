// The vector vocabulary of the kernels: one register of float or double lanes, and loads and stores that convert
// from and to the stored type. Compiled once per instruction set, inside that set's own namespace.
//
// It is built on the compiler's vector extensions (GCC and Clang) rather than on at::vec, because at::vec pulls in
// c10's inline functions: compiled for AVX-512 they would be weak symbols that the linker may pick for everybody.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__x86_64__)
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

// a ⊙ b + c, rounded once where the instruction set can. For sums whose last term is optional: the compiler fuses a
// product with a sum in the same basic block alone, which behind a branch is one register of four and not the next.
#if defined(__AVX512F__)
SE_EXT_INLINE vfloat multiply_add(vfloat a, vfloat b, vfloat c) {
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
SE_EXT_INLINE vdouble multiply_add(vdouble a, vdouble b, vdouble c) {
  return (vdouble)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(__AVX2__)
SE_EXT_INLINE vfloat multiply_add(vfloat a, vfloat b, vfloat c) {
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
SE_EXT_INLINE vdouble multiply_add(vdouble a, vdouble b, vdouble c) {
  return (vdouble)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#else
template <class V>
SE_EXT_INLINE V multiply_add(V a, V b, V c) {
  return a * b + c;
}
#endif

template <class To, class From>
SE_EXT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// limit < x ? limit : x, and limit > x ? limit : x, as the one instruction that the comparison's NaN rules keep the
// compiler from using: a NaN x stays.
#if defined(__AVX512F__)
SE_EXT_INLINE vfloat at_most(vfloat limit, vfloat x) {
  return (vfloat)_mm512_min_ps((__m512)limit, (__m512)x);
}
SE_EXT_INLINE vfloat at_least(vfloat limit, vfloat x) {
  return (vfloat)_mm512_max_ps((__m512)limit, (__m512)x);
}
#elif defined(__AVX2__)
SE_EXT_INLINE vfloat at_most(vfloat limit, vfloat x) {
  return (vfloat)_mm256_min_ps((__m256)limit, (__m256)x);
}
SE_EXT_INLINE vfloat at_least(vfloat limit, vfloat x) {
  return (vfloat)_mm256_max_ps((__m256)limit, (__m256)x);
}
#elif defined(__SSE2__)
SE_EXT_INLINE vfloat at_most(vfloat limit, vfloat x) {
  return (vfloat)_mm_min_ps((__m128)limit, (__m128)x);
}
SE_EXT_INLINE vfloat at_least(vfloat limit, vfloat x) {
  return (vfloat)_mm_max_ps((__m128)limit, (__m128)x);
}
#else
SE_EXT_INLINE vfloat at_most(vfloat limit, vfloat x) {
  return limit < x ? limit : x;
}
SE_EXT_INLINE vfloat at_least(vfloat limit, vfloat x) {
  return limit > x ? limit : x;
}
#endif
SE_EXT_INLINE vdouble at_most(vdouble limit, vdouble x) {
  return limit < x ? limit : x;
}
SE_EXT_INLINE vdouble at_least(vdouble limit, vdouble x) {
  return limit > x ? limit : x;
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
// There is no masked access to 16-bit lanes: whole pairs as 32-bit lanes, and an odd last one by itself.
SE_EXT_INLINE __m128i pair_mask(int count) {
  return _mm_cmpgt_epi32(_mm_set1_epi32(count / 2), _mm_setr_epi32(0, 1, 2, 3));
}
SE_EXT_INLINE vuint16 load_first(const std::uint16_t* p, First f) {
  const __m128i pairs = _mm_maskload_epi32(reinterpret_cast<const int*>(p), pair_mask(f.count));
  if (f.count % 2 == 0) return (vuint16)pairs;
  const __m128i lane = _mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7);
  const __m128i is_last = _mm_cmpeq_epi16(lane, _mm_set1_epi16(static_cast<short>(f.count - 1)));
  const __m128i last = _mm_set1_epi16(static_cast<short>(p[f.count - 1]));
  return (vuint16)_mm_or_si128(pairs, _mm_and_si128(is_last, last));
}
SE_EXT_INLINE void store_first(float* p, vfloat v, First f) {
  _mm256_maskstore_ps(p, first_mask32(f.count), (__m256)v);
}
SE_EXT_INLINE void store_first(double* p, vdouble v, First f) {
  _mm256_maskstore_pd(p, first_mask64(f.count), (__m256d)v);
}
SE_EXT_INLINE void store_first(std::uint16_t* p, vuint16 v, First f) {
  _mm_maskstore_epi32(reinterpret_cast<int*>(p), pair_mask(f.count), (__m128i)v);
  if (f.count % 2 == 0) return;
  const __m128i to_first = _mm_set1_epi16(static_cast<short>(0x0100 + 0x0202 * (f.count - 1)));
  p[f.count - 1] = static_cast<std::uint16_t>(_mm_extract_epi16(_mm_shuffle_epi8((__m128i)v, to_first), 0));
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

// A whole register past the caches, to an address that is a multiple of its size; fence_streams() then makes these
// stores visible to other threads in order. Plain stores where there is nothing to gain.
#if defined(__x86_64__)
template <class V, class E>
SE_EXT_INLINE void stream_raw(E* p, V v) {
  if constexpr (sizeof(V) == 64) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(v));
#endif
  } else if constexpr (sizeof(V) == 32) {
#if defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(v));
#endif
  } else if constexpr (sizeof(V) == 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), bit_cast<__m128i>(v));
  } else {
    static_assert(sizeof(V) == 8);
    _mm_stream_si64(reinterpret_cast<long long*>(p), bit_cast<long long>(v));
  }
}
SE_EXT_INLINE void fence_streams() {
  _mm_sfence();
}
#else
template <class V, class E>
SE_EXT_INLINE void stream_raw(E* p, V v) {
  store_raw(p, v, All{});
}
SE_EXT_INLINE void fence_streams() {}
#endif

// ---- conversions of the half types ----

#if defined(__AVX512F__)
SE_EXT_INLINE vfloat widen_bfloat16(vuint16 h) {
  return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
}
SE_EXT_INLINE vuint16 upper_halves(vuint32 u) {
  return (vuint16)_mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)u, 16));
}
#elif defined(__AVX2__)
SE_EXT_INLINE vfloat widen_bfloat16(vuint16 h) {
  return (vfloat)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
}
SE_EXT_INLINE vuint16 upper_halves(vuint32 u) {
  const __m256i halves = _mm256_srai_epi32((__m256i)u, 16);
  const __m256i packed = _mm256_packs_epi32(halves, halves);
  return (vuint16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
#elif defined(__SSE2__)
SE_EXT_INLINE vfloat widen_bfloat16(vuint16 h) {
  return (vfloat)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_cvtsi64_si128(bit_cast<long long>(h)));
}
SE_EXT_INLINE vuint16 upper_halves(vuint32 u) {
  const __m128i halves = _mm_srai_epi32((__m128i)u, 16);
  return bit_cast<vuint16>(_mm_cvtsi128_si64(_mm_packs_epi32(halves, halves)));
}
#else
SE_EXT_INLINE vfloat widen_bfloat16(vuint16 h) {
  return bit_cast<vfloat>(__builtin_convertvector(h, vuint32) << 16);
}
SE_EXT_INLINE vuint16 upper_halves(vuint32 u) {
  return __builtin_convertvector(u >> 16, vuint16);
}
#endif

// Round to nearest, ties to even, in the upper half of each lane; a NaN stays a NaN. AVX-512's own conversion is not
// used: it flushes subnormals to zero.
SE_EXT_INLINE vuint32 round_to_bfloat16(vfloat v) {
  const vuint32 u = bit_cast<vuint32>(v);
  const vuint32 all_ones_if_nan = (vuint32)(v != v);
  return (u + 0x7fffu + ((u >> 16) & 1u)) | all_ones_if_nan;
}
SE_EXT_INLINE vuint16 narrow_bfloat16(vfloat v) {
  return upper_halves(round_to_bfloat16(v));
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

// Two neighbouring registers, where one store of both is cheaper.
template <class T, class V>
SE_EXT_INLINE void store_two(T* p, V v0, V v1) {
  store(p, v0, All{});
  store(p + kLanes<acc_t<T>>, v1, All{});
}
#if defined(__AVX2__) && !defined(__AVX512F__)
SE_EXT_INLINE void store_two(bfloat16* p, vfloat v0, vfloat v1) {
  const __m256i h0 = _mm256_srai_epi32((__m256i)round_to_bfloat16(v0), 16);
  const __m256i h1 = _mm256_srai_epi32((__m256i)round_to_bfloat16(v1), 16);
  store_raw(&p->bits, _mm256_permute4x64_epi64(_mm256_packs_epi32(h0, h1), 0xd8), All{});
}
#elif defined(__SSE2__) && !defined(__AVX2__)
SE_EXT_INLINE void store_two(bfloat16* p, vfloat v0, vfloat v1) {
  const __m128i h0 = _mm_srai_epi32((__m128i)round_to_bfloat16(v0), 16);
  const __m128i h1 = _mm_srai_epi32((__m128i)round_to_bfloat16(v1), 16);
  store_raw(&p->bits, _mm_packs_epi32(h0, h1), All{});
}
#endif

SE_EXT_INLINE void stream(float* p, vfloat v) {
  stream_raw(p, v);
}
SE_EXT_INLINE void stream(double* p, vdouble v) {
  stream_raw(p, v);
}
SE_EXT_INLINE void stream(bfloat16* p, vfloat v) {
  stream_raw(&p->bits, narrow_bfloat16(v));
}
SE_EXT_INLINE void stream(float16* p, vfloat v) {
  stream_raw(&p->bits, narrow_float16(v));
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

// Rows become columns: afterwards lane j of v[i] is what lane i of v[j] was. At every step, blocks of kStep lanes
// change places between registers kStep apart.
template <int kStep, class V, std::size_t... lane>
SE_EXT_INLINE void exchange(V& a, V& b, std::index_sequence<lane...>) {
  constexpr int L = sizeof...(lane);
  const V low = __builtin_shufflevector(a, b, (lane & kStep ? L + static_cast<int>(lane) - kStep : lane)...);
  const V high = __builtin_shufflevector(a, b, (lane & kStep ? L + static_cast<int>(lane) : lane + kStep)...);
  a = low;
  b = high;
}
template <class A, int kStep = kLanes<A> / 2>
SE_EXT_INLINE void transpose(Vec<A>* v) {
  for (int i = 0; i < kLanes<A>; ++i) {
    if (!(i & kStep)) exchange<kStep>(v[i], v[i + kStep], std::make_index_sequence<kLanes<A>>{});
  }
  if constexpr (kStep > 1) transpose<A, kStep / 2>(v);
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
