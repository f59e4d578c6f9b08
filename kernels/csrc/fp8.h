// float8 e4m3fn as it is stored, and its conversions. Formulas in kernels/transformer/fp8.py.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"
#include "number.h"

namespace cohobate {

struct fp8 {
  uint8_t bits;
};

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Saturates to +-448, rounds to nearest even; NaN stays NaN.
static inline void store(fp8* p, float value) {
  constexpr uint32_t kLargest = 0x43E00000u, kNormal = 121u << 23, kShift = 141u << 23;  // 448, 2^-6, 2^14
  const uint32_t bits = bits_of(value), sign = bits & 0x80000000u, size = bits ^ sign;
  const uint32_t clamped = size < kLargest ? size : kLargest;
  // Adding 2^14 leaves multiples of 2^-9 in the lowest bits, which is how numbers below 2^-6 are stored.
  const uint32_t small = bits_of(float_of(clamped) + float_of(kShift)) - kShift;
  const uint32_t normal = (clamped - (120u << 23) + 0x7FFFFu + ((clamped >> 20) & 1u)) >> 20;
  const uint32_t finite = clamped < kNormal ? small : normal;
  p->bits = static_cast<uint8_t>((size > 0x7F800000u ? 0x7Fu : finite) | (sign >> 24));
}

static inline float load(const fp8* p) {
  const uint32_t sign = static_cast<uint32_t>(p->bits & 0x80u) << 24, size = p->bits & 0x7Fu;
  const float small = static_cast<float>(static_cast<int32_t>(size)) * 0x1p-9f;
  const uint32_t finite = size < 8 ? bits_of(small) : (size << 20) + (120u << 23);
  return float_of((size == 0x7Fu ? 0x7FC00000u : finite) | sign);
}

}  // namespace cohobate

COHOBATE_KERNELS(
    // [rows, width], rows of x `stride` elements apart, out contiguous.
    void quantise(const void* x, Dtype dtype, int64_t stride, int64_t rows, int64_t width, float inverse, fp8* out);
    void dequantise(const fp8* x, int64_t stride, int64_t rows, int64_t width, float scale, void* out, Dtype dtype);)
