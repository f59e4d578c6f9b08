// Rows of any width in vectors as wide as the registers are. Included by *.kernel.cpp files alone, inside their namespace.
#pragma once

#include <type_traits>

#include "ahead.h"
#include "fp8.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace cohobate {
namespace COHOBATE_ISA {

#if defined(__AVX512F__)
constexpr int64_t kWide = 16;
#elif defined(__AVX2__)
constexpr int64_t kWide = 8;
#else
constexpr int64_t kWide = 4;
#endif

typedef float Wide __attribute__((vector_size(kWide * 4)));

static inline Wide load_wide(const float* from) {
  Wide values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

static inline Wide load_wide(const bf16* from) {
#ifdef __AVX512F__
  return (Wide)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16);
#else
  typedef uint16_t Half __attribute__((vector_size(kWide * 2)));
  typedef int32_t Bits __attribute__((vector_size(kWide * 4)));
  Half bits;
  std::memcpy(&bits, from, sizeof bits);
  return (Wide)(__builtin_convertvector(bits, Bits) << 16);
#endif
}

// Rounded as `store` does; the one instruction for bf16 takes what is below the normal numbers for 0.
template <class T>
static inline void store_wide(T* to, Wide values) {
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, bf16>) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)values));
    return;
  }
#elif defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (std::is_same_v<T, bf16>) {
    const __m256i bits = (__m256i)values, one = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), one);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan = (__m256i)(values != values);
    const __m256i half = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
    return;
  }
#endif
  float lanes[kWide];
  std::memcpy(lanes, &values, sizeof values);
#pragma omp simd
  for (int64_t l = 0; l < kWide; ++l) store(to + l, lanes[l]);
}

static inline void store_wide(float* to, Wide values) { std::memcpy(to, &values, sizeof values); }

// The sum of all lanes, by halving.
static inline float total_of(Wide values) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)values);
#else
  float lanes[kWide];
  store_wide(lanes, values);
  for (int64_t half = kWide / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
#endif
}

// body(k, count) for every vector of a row: values k ... k + count. All but the last count are known to the compiler.
template <class F>
static inline void each_vector(int64_t width, F body) {
  int64_t k = 0;
  for (; k + kWide <= width; k += kWide) body(k, std::integral_constant<int64_t, kWide>{});
  if (k < width) body(k, width - k);
}

// The first `count` values, and 0.
template <class T>
static inline Wide load_part(const T* from, int64_t count) {
  T values[kWide] = {};
  std::memcpy(values, from, count * sizeof(T));
  return load_wide(values);
}

template <class T>
static inline Wide load_part(const T* from, std::integral_constant<int64_t, kWide>) {
  return load_wide(from);
}

template <class T>
static inline void store_part(T* to, Wide values, int64_t count) {
  T rounded[kWide];
  store_wide(rounded, values);
  std::memcpy(to, rounded, count * sizeof(T));
}

template <class T>
static inline void store_part(T* to, Wide values, std::integral_constant<int64_t, kWide>) {
  store_wide(to, values);
}

}  // namespace COHOBATE_ISA
}  // namespace cohobate
