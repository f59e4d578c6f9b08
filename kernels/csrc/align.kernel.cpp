#include "align.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "vector.h"

namespace cohobate {
namespace COHOBATE_ISA {

constexpr int64_t kSums = 64;  // partial sums of a row: the same tree for every instruction set

static inline float sum_lanes(const float* lanes) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < kSums; ++k) sum += lanes[k];
  return sum;
}

// Sum of value(0) ... value(count - 1).
template <class F>
static inline float sum_of(int64_t count, F value) {
  float lanes[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
#pragma omp simd
    for (int64_t k = 0; k < kSums; ++k) lanes[k] += value(i + k);
  for (int64_t k = 0; i + k < count; ++k) lanes[k] += value(i + k);
  return sum_lanes(lanes);
}

// Copy past the caches: a gradient larger than them is only read again after they have been overwritten.
static inline void stream(char* to, const char* from, int64_t bytes) {
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0 && bytes % 64 == 0) {
    for (int64_t i = 0; i < bytes; i += 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
    return;
  }
#elif defined(__AVX2__)
  if (reinterpret_cast<uintptr_t>(to) % 32 == 0 && bytes % 32 == 0) {
    for (int64_t i = 0; i < bytes; i += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

// Sixteen floats past the caches; `to` is a multiple of 64 bytes.
static inline void stream_vector(float* to, Vector values) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)values);
#else
  store_vector(to, values);
#endif
}

static inline void stream_fence() {
#if defined(__AVX512F__) || defined(__AVX2__)
  _mm_sfence();
#endif
}

template <class T>
static inline const T* row_at(const AlignRows& view, int64_t b, int64_t j) {
  return static_cast<const T*>(view.data) + b * view.batch_stride + view.row(b, j) * view.row_stride;
}

struct Moments {
  float mean = 0, inverse = 1;
};

// One pass over deviations from the mean of the first 64 values. That mean is at most sqrt(width / 64) standard deviations
// off, so the variance loses no digits; and a constant row deviates by nothing, or by one rounding, and becomes zero.
//
// Rows are chosen by index, so hardware prefetchers lose the thread at every gap: each step here and below asks for its part
// of the row after this one.
template <class T>
static inline Moments moments_of(const T* __restrict target, const T* next, const AlignLayer& layer) {
  if (!layer.standardise) return {};
  const int64_t width = layer.width, head = std::min(width, kSums);
  const float pivot = sum_of(head, [=](int64_t i) { return load(target + i); }) / head;
  Vector sums[4] = {}, squares[4] = {};
  int64_t i = 0;
  for (; i + kSums <= width; i += kSums)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const Vector difference = load_vector(target + i + v * kLanes) - pivot;
      __builtin_prefetch(next + i + v * kLanes, 0, 0);  // read once
      sums[v] += difference;
      squares[v] += difference * difference;
    }
  float sum = sum_of(sums[0] + sums[1] + sums[2] + sums[3]), square = sum_of(squares[0] + squares[1] + squares[2] + squares[3]);
  for (; i < width; ++i) {
    const float difference = load(target + i) - pivot;
    sum += difference;
    square += difference * difference;
  }
  const float mean = sum / width;
  const float variance = std::max(0.0f, square - sum * mean) / (width - layer.ddof);
  const float spread = layer.eps_inside ? std::sqrt(variance + layer.eps) : std::sqrt(variance) + layer.eps;
  return {pivot + mean, 1 / spread};
}

// Slope (without its factor) and loss of an error, one value or sixteen. Comparisons are in the order that lets NaN through.
template <AlignKind kKind, class V>
static inline void elementwise(V error, float beta, V& slope, V& loss) {
  if constexpr (kKind == AlignKind::smooth_l1) {
    slope = -beta > error ? V{} - beta : error;
    slope = beta < slope ? V{} + beta : slope;
    loss = slope * (error - 0.5f * slope);
  } else if constexpr (kKind == AlignKind::mse) {
    slope = error;
    loss = error * error;
  } else {
    slope = error < 0 ? V{} - 1.0f : error > 0 ? V{} + 1.0f : error;
    loss = error < 0 ? -error : error;
  }
}

// What becomes of the gradient: nothing, a row in the caches, or a row of the result past them.
enum class Write { nothing, cached, streamed };

template <AlignKind kKind, Write kWrite, class P, class T>
static inline float elementwise_row(const P* __restrict prediction, const P* next, const T* __restrict target,
                                    P* __restrict grad, const Moments m, const AlignLayer& layer) {
  const float beta = layer.beta;
  const float factor = kKind == AlignKind::smooth_l1 ? 1 / beta : 1;
  const float scale = layer.scale * (kKind == AlignKind::mse ? 2 : factor);
  Vector sums[4] = {};
  int64_t i = 0;
  for (; i + kSums <= layer.width; i += kSums)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const int64_t j = i + v * kLanes;
      Vector slope, loss;
      elementwise<kKind>(load_vector(prediction + j) - (load_vector(target + j) - m.mean) * m.inverse, beta, slope, loss);
      __builtin_prefetch(next + j, 0, 0);
      sums[v] += loss;
      if constexpr (kWrite == Write::streamed)
        stream_vector(grad + j, slope * scale);
      else if constexpr (kWrite == Write::cached)
        store_vector(grad + j, slope * scale);
    }
  float sum = sum_of(sums[0] + sums[1] + sums[2] + sums[3]);
  for (; i < layer.width; ++i) {
    float slope, loss;
    elementwise<kKind>(load(prediction + i) - (load(target + i) - m.mean) * m.inverse, beta, slope, loss);
    sum += loss;
    if constexpr (kWrite != Write::nothing) store(grad + i, slope * scale);
  }
  return factor * sum;
}

// 1 - cos(p, g). Norms are clamped at 1e-8 as torch.nn.functional.cosine_similarity does.
template <bool kGrad, class P, class T>
static inline float cosine_row(const P* __restrict prediction, const T* __restrict target, P* __restrict grad, const Moments m,
                               const AlignLayer& layer) {
  const int64_t width = layer.width;
  const auto p = [=](int64_t i) { return load(prediction + i); };
  const auto g = [=](int64_t i) { return (load(target + i) - m.mean) * m.inverse; };
  const float dot = sum_of(width, [=](int64_t i) { return p(i) * g(i); });
  const float p_norm = std::sqrt(sum_of(width, [=](int64_t i) { return p(i) * p(i); }));
  const float g_norm = std::sqrt(sum_of(width, [=](int64_t i) { return g(i) * g(i); }));
  const float p_safe = std::max(p_norm, 1e-8f), product = 1 / (p_safe * std::max(g_norm, 1e-8f));
  const float cosine = dot * product;
  if constexpr (kGrad) {
    const float along = p_norm > 0 ? layer.scale * cosine / (p_safe * p_norm) : 0;
    const float across = layer.scale * product;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) store(grad + i, along * p(i) - across * g(i));
  }
  return 1 - cosine;
}

template <AlignKind kKind, bool kGrad, class P, class T>
static void layer_of(const AlignLayer& layer, const uint8_t* is_read, float* row_losses) {
  const AlignRows &from = layer.prediction, &to = layer.target;
  const int64_t total = layer.batch * layer.count, length = from.length, bytes = layer.width * static_cast<int64_t>(sizeof(P));
  char* grad = static_cast<char*>(layer.grad);
  [[maybe_unused]] const bool direct = reinterpret_cast<uintptr_t>(grad) % 64 == 0 && bytes % 64 == 0;
#pragma omp parallel
  {
    std::vector<P> row(layer.width), zeros(layer.width);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < total; ++i) {
      const int64_t b = i / layer.count, j = i % layer.count, next = i + 1 < total ? i + 1 : i;
      const P* prediction = row_at<P>(from, b, j);
      const T* target = row_at<T>(to, b, j);
      const P* next_prediction = row_at<P>(from, next / layer.count, next % layer.count);
      const Moments m = moments_of(target, row_at<T>(to, next / layer.count, next % layer.count), layer);
      char* place = kGrad ? grad + (b * length + from.row(b, j)) * bytes : nullptr;
      if constexpr (kKind == AlignKind::cosine) {
        row_losses[i] = cosine_row<kGrad>(prediction, target, row.data(), m, layer);
      } else if constexpr (!kGrad) {
        row_losses[i] = elementwise_row<kKind, Write::nothing>(prediction, next_prediction, target, row.data(), m, layer);
      } else {
        if constexpr (std::is_same_v<P, float>)
          if (direct) {
            row_losses[i] = elementwise_row<kKind, Write::streamed>(prediction, next_prediction, target,
                                                                    reinterpret_cast<float*>(place), m, layer);
            continue;
          }
        row_losses[i] = elementwise_row<kKind, Write::cached>(prediction, next_prediction, target, row.data(), m, layer);
      }
      if (kGrad) stream(place, reinterpret_cast<const char*>(row.data()), bytes);
    }
    if (kGrad && from.rows) {
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < layer.batch * length; ++i)
        if (!is_read[i]) stream(grad + i * bytes, reinterpret_cast<const char*>(zeros.data()), bytes);
    }
    stream_fence();
  }
}

template <AlignKind kKind, class P, class T>
static void by_gradient(const AlignLayer& layer, const uint8_t* is_read, float* row_losses) {
  (layer.grad ? layer_of<kKind, true, P, T> : layer_of<kKind, false, P, T>)(layer, is_read, row_losses);
}

template <AlignKind kKind, class P>
static void by_target(const AlignLayer& layer, const uint8_t* is_read, float* row_losses) {
  (layer.target.dtype == Dtype::f32 ? by_gradient<kKind, P, float> : by_gradient<kKind, P, bf16>)(layer, is_read, row_losses);
}

template <AlignKind kKind>
static void by_prediction(const AlignLayer& layer, const uint8_t* is_read, float* row_losses) {
  (layer.prediction.dtype == Dtype::f32 ? by_target<kKind, float> : by_target<kKind, bf16>)(layer, is_read, row_losses);
}

void align(const AlignLayer& layer, const uint8_t* is_read, float* row_losses) {
  switch (layer.kind) {
    case AlignKind::smooth_l1: return by_prediction<AlignKind::smooth_l1>(layer, is_read, row_losses);
    case AlignKind::mse: return by_prediction<AlignKind::mse>(layer, is_read, row_losses);
    case AlignKind::l1: return by_prediction<AlignKind::l1>(layer, is_read, row_losses);
    case AlignKind::cosine: return by_prediction<AlignKind::cosine>(layer, is_read, row_losses);
  }
}

}  // namespace COHOBATE_ISA
}  // namespace cohobate
