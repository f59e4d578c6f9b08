// Sixteen floats at a time, on every instruction set. Included by *.kernel.cpp files alone, inside their namespace.
#pragma once

#include <cstdint>
#include <cstring>

#include "number.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace cohobate {
namespace COHOBATE_ISA {

constexpr int64_t kLanes = 16;

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef int32_t Bits __attribute__((vector_size(kLanes * 4)));

static inline Vector load_vector(const float* from) {
  Vector values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

static inline Vector load_vector(const bf16* from) {
  typedef uint16_t Half __attribute__((vector_size(kLanes * 2)));
  Half bits;
  std::memcpy(&bits, from, sizeof bits);
  return (Vector)(__builtin_convertvector(bits, Bits) << 16);
}

static inline void store_vector(float* to, Vector values) { std::memcpy(to, &values, sizeof values); }

// Round to nearest even; NaN stays NaN.
static inline void store_vector(bf16* to, Vector values) {
  typedef uint16_t Half __attribute__((vector_size(kLanes * 2)));
  typedef uint32_t Unsigned __attribute__((vector_size(kLanes * 4)));
  const Unsigned bits = (Unsigned)values, rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
  const Half half = __builtin_convertvector(values != values ? quiet : rounded, Half);
  std::memcpy(to, &half, sizeof half);
}

// One number out of sixteen, by halving.
template <class F>
static inline float reduce(Vector values, F combine) {
  float lanes[kLanes];
  store_vector(lanes, values);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
#pragma omp simd
    for (int l = 0; l < half; ++l) lanes[l] = combine(lanes[l], lanes[l + half]);
  return lanes[0];
}

static inline float sum_of(Vector values) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)values);  // the same tree, in registers
#else
  return reduce(values, [](float a, float b) { return a + b; });
#endif
}

static inline float max_of(Vector values) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)values);
#else
  return reduce(values, [](float a, float b) { return a > b ? a : b; });
#endif
}

}  // namespace COHOBATE_ISA
}  // namespace cohobate
