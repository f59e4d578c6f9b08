// bfloat16 as it is stored, with conversions that compilers vectorise. Arithmetic is always fp32.
#pragma once

#include <cstdint>
#include <cstring>

namespace cohobate {

struct bf16 {
  uint16_t bits;
};

// Storage types that bindings pass down: the code of a tensor's dtype.
enum class Dtype { f32 = 0, bf16 = 1 };

static inline float load(const float* p) { return *p; }

static inline float load(const bf16* p) {
  uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline void store(float* p, float value) { *p = value; }

// Round to nearest even; NaN stays NaN.
static inline void store(bf16* p, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  p->bits = static_cast<uint16_t>(value != value ? quiet : rounded);
}

}  // namespace cohobate
