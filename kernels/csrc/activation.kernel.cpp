#include "activation.h"

#include <algorithm>
#include <cmath>

#include "fp8.h"

namespace cohobate {
namespace COHOBATE_ISA {
namespace {

// exp(-u) for u >= 0, within 2 units in the last place; 0 where it would be below the normal numbers.
inline float exp_minus(float u) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the lowest bits
  const float shifted = kRound - u * 1.44269504f, n = shifted - kRound;
  const float f = (-u - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.98412698e-4f;  // Taylor: 5e-9 off at |f| = ln(2) / 2
  p = p * f + 1.38888889e-3f;
  p = p * f + 8.33333333e-3f;
  p = p * f + 4.16666667e-2f;
  p = p * f + 1.66666667e-1f;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  const float power = float_of((bits_of(shifted) << 23) + 0x3F800000u);
  return u > 87.0f ? 0.0f : p * power;
}

// gelu(v) = v * share, and its derivative.
struct Gelu {
  float share, slope;
};

// The normal distribution: below -|v| it is exp(-v^2 / 2) times a polynomial in 1 / (1 + 0.21 |v|), fitted to a relative
// error of 2e-8. So both tails keep their digits, and the density comes for free.
inline Gelu exact(float v) {
  const float size = std::fabs(v), t = 1 / (1 + 0.21f * size), density = exp_minus(0.5f * v * v);
  float p = -0.0716575f;
  p = p * t + 0.28359457f;
  p = p * t - 0.33026629f;
  p = p * t + 0.34941641f;
  p = p * t - 0.09393635f;
  p = p * t + 0.12487773f;
  p = p * t + 0.06919081f;
  p = p * t + 0.08506906f;
  p = p * t + 0.08371156f;
  const float tail = p * t * density, share = v > 0 ? 1 - tail : tail;
  return {share, share + v * density * 0.398942280f};
}

// (1 + tanh(u)) / 2 is the logistic function of 2 u, u = sqrt(2 / pi) * (v + 0.044715 v^3).
inline Gelu with_tanh(float v) {
  const float square = v * v, twice = 1.59576912f * v * (1 + 0.044715f * square);
  const float e = exp_minus(std::fabs(twice)), s = 1 / (1 + e), share = twice > 0 ? s : e * s;
  return {share, share + v * e * s * s * 1.59576912f * (1 + 0.134145f * square)};
}

template <bool kTanh>
inline Gelu gelu(float v) {
  return kTanh ? with_tanh(v) : exact(v);
}

template <bool kTanh, bool kScaled, class X, class Out>
void forward(const BiasGelu& a, void* result, float inverse) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < a.rows; ++i) {
    const X* __restrict x = static_cast<const X*>(a.x) + i * a.stride;
    const float* __restrict bias = a.bias;
    Out* __restrict out = static_cast<Out*>(result) + i * a.width;
#pragma omp simd
    for (int64_t k = 0; k < a.width; ++k) {
      const float v = load(x + k) + bias[k];
      store(out + k, v * gelu<kTanh>(v).share * (kScaled ? inverse : 1));
    }
  }
}

template <bool kTanh, class X>
void backward(const BiasGelu& a, const void* grads, int64_t grad_stride, void* dxs, int64_t chunk, float* partial) {
  const int64_t chunks = (a.rows + chunk - 1) / chunk;
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < chunks; ++task) {
    float* __restrict sum = partial ? partial + task * a.width : nullptr;
    if (sum) std::fill_n(sum, a.width, 0.0f);
    for (int64_t i = task * chunk; i < std::min(a.rows, (task + 1) * chunk); ++i) {
      const X* __restrict x = static_cast<const X*>(a.x) + i * a.stride;
      const X* __restrict grad = static_cast<const X*>(grads) + i * grad_stride;
      const float* __restrict bias = a.bias;
      X* __restrict dx = static_cast<X*>(dxs) + i * a.width;
      if (sum) {
#pragma omp simd
        for (int64_t k = 0; k < a.width; ++k) {
          const float value = load(grad + k) * gelu<kTanh>(load(x + k) + bias[k]).slope;
          store(dx + k, value);
          sum[k] += value;
        }
      } else {
#pragma omp simd
        for (int64_t k = 0; k < a.width; ++k)
          store(dx + k, load(grad + k) * gelu<kTanh>(load(x + k) + bias[k]).slope);
      }
    }
  }
}

template <bool kTanh, class X>
void forward_to(const BiasGelu& a, void* out, bool is_fp8, float inverse) {
  (is_fp8 ? forward<kTanh, true, X, fp8> : forward<kTanh, false, X, X>)(a, out, inverse);
}

}  // namespace

void bias_gelu(const BiasGelu& a, void* out, bool is_fp8, float inverse) {
  const bool wide = a.dtype == Dtype::f32;
  const auto run = a.tanh ? (wide ? forward_to<true, float> : forward_to<true, bf16>)
                          : (wide ? forward_to<false, float> : forward_to<false, bf16>);
  run(a, out, is_fp8, inverse);
}

void bias_gelu_backward(const BiasGelu& a, const void* grad, int64_t grad_stride, void* dx, int64_t chunk, float* partial) {
  const bool wide = a.dtype == Dtype::f32;
  const auto run =
      a.tanh ? (wide ? backward<true, float> : backward<true, bf16>) : (wide ? backward<false, float> : backward<false, bf16>);
  run(a, grad, grad_stride, dx, chunk, partial);
}

}  // namespace COHOBATE_ISA
}  // namespace cohobate
