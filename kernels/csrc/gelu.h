// GELU and its slope for results that are rounded to bf16: no division, no exponential. Included by *.kernel.cpp files alone,
// inside their namespace.
#pragma once

#include <limits>

#include "sweep.h"

namespace cohobate {
namespace COHOBATE_ISA {

// x, held inside [low, high]; NaN stays NaN.
static inline Wide held(Wide x, float low, float high) {
#ifdef __AVX512F__
  return (Wide)_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), (__m512)x));
#else
  x = x < low ? Wide{} + low : x;
  return x > high ? Wide{} + high : x;
#endif
}

// Phi(x) - 1/2 and x phi(x) are odd: x times a polynomial in t, which takes x^2 from [0, end^2] to [-1, 1]. The highest power
// comes first; odd and even powers run beside each other. Fitted in float64 to the result's largest error over |x| + 4.
template <int kTerms>
static inline Wide odd(Wide x, float end, const float (&terms)[kTerms]) {
  static_assert(kTerms % 2 == 0);
  const Wide t = x * x * (2 / (end * end)) - 1.0f, square = t * t;
  Wide high = Wide{} + terms[0], low = Wide{} + terms[1];
#pragma GCC unroll 16
  for (int i = 2; i < kTerms; i += 2) high = high * square + terms[i], low = low * square + terms[i + 1];
  return x * (high * t + low);
}

// x Phi(x), within 4e-6 up to x = 5 and within 8e-7 of x beyond (of which bf16 keeps 4e-3).
static inline Wide gelu_of(Wide x) {
  constexpr float kEnd = 5.0f, kLargest = std::numeric_limits<float>::infinity();
  constexpr float kTerms[] = {-0.00117950161f, 0.00327010565f, -0.00371188582f, 0.00495816871f, -0.0102935613f, 0.0170190633f,
                              -0.0235864552f,  0.0313263231f,  -0.0403962509f,  0.0515282673f,  -0.0702981237f, 0.141363706f};
  return held(x, -kEnd, kLargest) * (odd(held(x, -kEnd, kEnd), kEnd, kTerms) + 0.5f);
}

// Phi(x) + x phi(x), within 3e-6.
static inline Wide gelu_slope_of(Wide x) {
  constexpr float kEnd = 5.2f;
  constexpr float kTerms[] = {-0.00941857229f, 0.0212792383f, -0.0110329408f, 0.0105044108f, -0.0458590607f,
                              0.0701469022f,   -0.070703337f, 0.075238859f,   -0.0792402027f, 0.0728827201f,
                              -0.0637389156f,  0.0605518095f, -0.0708697359f, 0.136412846f};
  return odd(held(x, -kEnd, kEnd), kEnd, kTerms) + 0.5f;
}

}  // namespace COHOBATE_ISA
}  // namespace cohobate
