#include "adamw.h"

#include <cmath>

#include "vector.h"

namespace cohobate {
namespace COHOBATE_ISA {

template <class T, bool kShadow>
static void update(const AdamwChunk& chunk, const AdamwNumbers& n) {
  float* __restrict parameter = chunk.parameter;
  float* __restrict exp_avg = chunk.exp_avg;
  float* __restrict exp_avg_sq = chunk.exp_avg_sq;
  bf16* __restrict shadow = chunk.shadow;
  const T* __restrict gradient = static_cast<const T*>(chunk.gradient);
  const float keep = chunk.keep, rate = chunk.rate, correction = chunk.correction;
#pragma omp simd
  for (int64_t k = 0; k < chunk.size; ++k) {
    const float g = load(gradient + k) * n.inverse;
    const float m = exp_avg[k] + (g - exp_avg[k]) * n.rest1;
    const float v = exp_avg_sq[k] * n.beta2 + g * g * n.rest2;
    const float p = parameter[k] * keep - rate * (m / (std::sqrt(v) * correction + n.eps));
    exp_avg[k] = m;
    exp_avg_sq[k] = v;
    parameter[k] = p;
    if constexpr (kShadow) store(shadow + k, p);
  }
}

template <class T>
static void update_all(const AdamwChunk* chunks, int64_t count, const AdamwNumbers& numbers) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < count; ++i) (chunks[i].shadow ? update<T, true> : update<T, false>)(chunks[i], numbers);
}

void adamw(const AdamwChunk* chunks, int64_t count, Dtype gradient, const AdamwNumbers& numbers) {
  (gradient == Dtype::f32 ? update_all<float> : update_all<bf16>)(chunks, count, numbers);
}

void adamw_shadows(const AdamwChunk* chunks, int64_t count) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < count; ++i) {
    const float* __restrict parameter = chunks[i].parameter;
    bf16* __restrict shadow = chunks[i].shadow;
    if (!shadow) continue;
#pragma omp simd
    for (int64_t k = 0; k < chunks[i].size; ++k) store(shadow + k, parameter[k]);
  }
}

// Four vectors side by side: enough additions in flight to wait for memory alone.
template <class T>
static float sum_of_squares(const T* values, int64_t size) {
  constexpr int64_t kSums = 4;
  Vector sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kLanes <= size; i += kSums * kLanes)
    for (int64_t s = 0; s < kSums; ++s) {
      const Vector x = load_vector(values + i + s * kLanes);
      sums[s] += x * x;
    }
  float rest = 0;
  for (; i < size; ++i) rest += load(values + i) * load(values + i);
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

void squares(const SquaresChunk* chunks, int64_t count, float* sums) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < count; ++i) {
    const SquaresChunk& chunk = chunks[i];
    sums[i] = chunk.dtype == Dtype::f32 ? sum_of_squares(static_cast<const float*>(chunk.values), chunk.size)
                                        : sum_of_squares(static_cast<const bf16*>(chunk.values), chunk.size);
  }
}

}  // namespace COHOBATE_ISA
}  // namespace cohobate
