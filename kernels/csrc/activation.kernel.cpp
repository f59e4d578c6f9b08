#include "activation.h"

#include <algorithm>
#include <cmath>

#include "gelu.h"
#include "sweep.h"

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

#ifdef __AVX512F__  // with narrower vectors, and no instruction that rounds to bf16, the polynomials are no faster
constexpr int64_t kAhead = 1024;  // values: a few times what waiting for memory takes

// The exact GELU of bf16 rows, by polynomials.
template <bool kScaled, class Out>
void forward_half(const BiasGelu& a, void* result, float inverse) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < a.rows; ++i) {
    const bf16* x = static_cast<const bf16*>(a.x) + i * a.stride;
    Out* out = static_cast<Out*>(result) + i * a.width;
    each_vector(a.width, [=, bias = a.bias](int64_t k, auto count) {
      ask(x + k + kAhead);
      ask_to_write(out + k + kAhead);
      const Wide value = gelu_of(load_part(x + k, count) + load_part(bias + k, count));
      store_part(out + k, kScaled ? value * inverse : value, count);
    });
  }
}

void backward_half(const BiasGelu& a, const void* grads, int64_t grad_stride, void* dxs, int64_t chunk, float* partial) {
  const int64_t chunks = (a.rows + chunk - 1) / chunk;
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < chunks; ++task) {
    float* sum = partial ? partial + task * a.width : nullptr;
    if (sum) std::fill_n(sum, a.width, 0.0f);
    for (int64_t i = task * chunk; i < std::min(a.rows, (task + 1) * chunk); ++i) {
      const bf16* x = static_cast<const bf16*>(a.x) + i * a.stride;
      const bf16* grad = static_cast<const bf16*>(grads) + i * grad_stride;
      bf16* dx = static_cast<bf16*>(dxs) + i * a.width;
      each_vector(a.width, [=, bias = a.bias](int64_t k, auto count) {
        ask(x + k + kAhead);
        ask(grad + k + kAhead);
        ask_to_write(dx + k + kAhead);
        const Wide slope = gelu_slope_of(load_part(x + k, count) + load_part(bias + k, count));
        const Wide value = load_part(grad + k, count) * slope;
        store_part(dx + k, value, count);
        if (sum) store_part(sum + k, load_part(sum + k, count) + value, count);
      });
    }
  }
}
#endif

template <bool kTanh, class X>
void forward_to(const BiasGelu& a, void* out, bool is_fp8, float inverse) {
  (is_fp8 ? forward<kTanh, true, X, fp8> : forward<kTanh, false, X, X>)(a, out, inverse);
}

void half_to(const BiasGelu& a, void* out, bool is_fp8, float inverse) {
#ifdef __AVX512F__
  (is_fp8 ? forward_half<true, fp8> : forward_half<false, bf16>)(a, out, inverse);
#else
  forward_to<false, bf16>(a, out, is_fp8, inverse);
#endif
}

void half_back(const BiasGelu& a, const void* grad, int64_t grad_stride, void* dx, int64_t chunk, float* partial) {
#ifdef __AVX512F__
  backward_half(a, grad, grad_stride, dx, chunk, partial);
#else
  backward<false, bf16>(a, grad, grad_stride, dx, chunk, partial);
#endif
}

}  // namespace

void bias_gelu(const BiasGelu& a, void* out, bool is_fp8, float inverse) {
  const bool wide = a.dtype == Dtype::f32;
  const auto run =
      a.tanh ? (wide ? forward_to<true, float> : forward_to<true, bf16>) : (wide ? forward_to<false, float> : half_to);
  run(a, out, is_fp8, inverse);
}

void bias_gelu_backward(const BiasGelu& a, const void* grad, int64_t grad_stride, void* dx, int64_t chunk, float* partial) {
  const bool wide = a.dtype == Dtype::f32;
  const auto run =
      a.tanh ? (wide ? backward<true, float> : backward<true, bf16>) : (wide ? backward<false, float> : half_back);
  run(a, grad, grad_stride, dx, chunk, partial);
}

}  // namespace COHOBATE_ISA
}  // namespace cohobate
