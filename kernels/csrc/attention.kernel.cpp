#include "attention.h"

#include "tile.h"

namespace cohobate {
namespace COHOBATE_ISA {

// A operands are stored by rows, B operands by the summed dimension with rows padded to kLanes.
constexpr int64_t kRows = 6, kVectors = 4;  // accumulators of a tile: 24 of 32 registers
constexpr int64_t kBlock = 4 * kRows;       // rows that pass together

#ifdef __AVX512BF16__
template <class T> struct OperandOf { using type = Single; };
template <> struct OperandOf<bf16> { using type = Pair; };
#else
template <class T> struct OperandOf { using type = Single; };
#endif

template <class Op, int kV>
static inline void tiles(const typename Op::Element* a, int64_t a_stride, const typename Op::Element* b, int64_t b_stride,
                         int64_t depth, float* c, int64_t c_stride, int64_t rows) {
  for (int64_t i = 0; i < rows; i += kRows) {
    const auto* from = a + i * a_stride;
    float* to = c + i * c_stride;
    const auto write = [=](int r, int v, Vector values) { store_vector(to + r * c_stride + v * kLanes, values); };
    switch (rows - i) {
      case 1: tile<Op, 1, kV>(from, a_stride, 1, b, b_stride, depth, write); break;
      case 2: tile<Op, 2, kV>(from, a_stride, 1, b, b_stride, depth, write); break;
      case 3: tile<Op, 3, kV>(from, a_stride, 1, b, b_stride, depth, write); break;
      case 4: tile<Op, 4, kV>(from, a_stride, 1, b, b_stride, depth, write); break;
      case 5: tile<Op, 5, kV>(from, a_stride, 1, b, b_stride, depth, write); break;
      default: tile<Op, 6, kV>(from, a_stride, 1, b, b_stride, depth, write);
    }
  }
}

// C [rows, columns]; columns are padded. A part of B stays in the first-level cache while all the rows pass.
template <class Op>
static void panel(const typename Op::Element* a, int64_t a_stride, const typename Op::Element* b, int64_t b_stride,
                  int64_t depth, float* c, int64_t c_stride, int64_t rows, int64_t columns) {
  int64_t left = columns / kLanes;
  while (left > 0) {
    const int64_t parts = (left + kVectors - 1) / kVectors, take = (left + parts - 1) / parts;  // parts of even width
    switch (take) {
      case 4: tiles<Op, 4>(a, a_stride, b, b_stride, depth, c, c_stride, rows); break;
      case 3: tiles<Op, 3>(a, a_stride, b, b_stride, depth, c, c_stride, rows); break;
      case 2: tiles<Op, 2>(a, a_stride, b, b_stride, depth, c, c_stride, rows); break;
      default: tiles<Op, 1>(a, a_stride, b, b_stride, depth, c, c_stride, rows);
    }
    b += take * kLanes;
    c += take * kLanes;
    left -= take;
  }
}

// Operands of one head in the layouts below, in a thread's own memory.
template <class Op>
class Scratch {
 public:
  using Element = typename Op::Element;

  explicit Scratch(int64_t elements) : next_(static_cast<Element*>(workspace<Scratch>(elements * sizeof(Element)))) {}
  Element* take(int64_t elements) {
    Element* start = next_;
    next_ += (elements + 31) / 16 * 16;  // room for a vector that starts at the last element
    return start;
  }
  float* floats(int64_t count) { return reinterpret_cast<float*>(take(count)); }

 private:
  Element* next_;
};

template <class Op>
static inline int64_t depth_of(int64_t n) {
  return (n + Op::kDepth - 1) / Op::kDepth;
}

// ---- layouts. T is the stored type, so each of them is a copy, an interleaving or a conversion.

// Rows as they are: A operand [rows, depth_of(columns)].
template <class Op, class T>
static void by_rows(const T* x, int64_t stride, int64_t rows, int64_t columns, typename Op::Element* out) {
  const int64_t depth = depth_of<Op>(columns);
  for (int64_t i = 0; i < rows; ++i) {
    if constexpr (Op::kDepth == 1) {
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) out[i * depth + j] = load(x + i * stride + j);
    } else {
      out[i * depth + depth - 1] = 0;  // the second half of the last pair, where the number of columns is odd
      std::memcpy(out + i * depth, x + i * stride, columns * sizeof(T));
    }
  }
}

// Summed over the rows: B operand [depth_of(rows), padded(columns)].
template <class Op, class T>
static void over_rows(const T* x, int64_t stride, int64_t rows, int64_t columns, typename Op::Element* out) {
  const int64_t width = padded(columns);
  for (int64_t i = 0; i < depth_of<Op>(rows); ++i) {
    typename Op::Element* to = out + i * width;
    if constexpr (Op::kDepth == 1) {
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) to[j] = load(x + i * stride + j);
    } else {
      const uint16_t* even = reinterpret_cast<const uint16_t*>(x + 2 * i * stride);
      if (2 * i + 1 < rows) {
        const uint16_t* odd = even + stride;
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j) to[j] = even[j] | static_cast<uint32_t>(odd[j]) << 16;
      } else {
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j) to[j] = even[j];
      }
    }
    std::memset(to + columns, 0, (width - columns) * sizeof *to);
  }
}

// out [columns, out_stride] = x [rows, stride] transposed.
template <class Element>
static void transpose(const Element* x, int64_t stride, int64_t rows, int64_t columns, Element* out, int64_t out_stride) {
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t height = rows - i < kLanes ? rows - i : kLanes, width = columns - j < kLanes ? columns - j : kLanes;
#ifdef __AVX512F__
      const __mmask16 read = (1u << width) - 1, write = (1u << height) - 1;
      Bits block[kLanes];
      for (int64_t r = 0; r < kLanes; ++r)
        block[r] = r < height ? (Bits)_mm512_maskz_loadu_epi32(read, x + (i + r) * stride + j) : Bits{};
      turn(block);
      for (int64_t c = 0; c < width; ++c) _mm512_mask_storeu_epi32(out + (j + c) * out_stride + i, write, (__m512i)block[c]);
#else
      for (int64_t c = 0; c < width; ++c)
        for (int64_t r = 0; r < height; ++r) out[(j + c) * out_stride + i + r] = x[(i + r) * stride + j + c];
#endif
    }
}

// Summed over the columns: B operand [depth_of(columns), padded(rows)], from the A operand of the same rows.
template <class Op>
static void over_columns(const typename Op::Element* by_rows, int64_t rows, int64_t columns, typename Op::Element* out) {
  const int64_t depth = depth_of<Op>(columns), width = padded(rows);
  transpose(by_rows, depth, rows, depth, out, width);
  for (int64_t k = 0; k < depth; ++k) std::memset(out + k * width + rows, 0, (width - rows) * sizeof *out);
}

// Sixteen values of a row from column j on, as part of a row of an A operand.
template <class Op>
static inline void store_operand(typename Op::Element* row, int64_t j, Vector values) {
#ifdef __AVX512BF16__
  if constexpr (Op::kDepth == 2) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + j / 2), (__m256i)_mm512_cvtneps_pbh((__m512)values));
    return;
  }
#endif
  std::memcpy(row + j, &values, sizeof values);
}

// A operand [columns, depth_of(rows)] of the transpose of an A operand [rows, stride] with that many columns.
template <class Op>
static void transposed(const typename Op::Element* x, int64_t stride, int64_t rows, int64_t columns,
                       typename Op::Element* pairs, typename Op::Element* out) {
  if constexpr (Op::kDepth == 1) {
    (void)pairs;
    transpose(x, stride, rows, columns, out, rows);
  } else {
    const int64_t height = depth_of<Op>(rows), width = padded(columns);
    over_rows<Op>(reinterpret_cast<const bf16*>(x), 2 * stride, rows, columns, pairs);
    transpose(pairs, width, height, columns, out, height);
  }
}

// The largest score of a row; the padding becomes so small that its weight is zero.
static inline float highest_of(float* scores, int64_t stride, int64_t keys) {
  for (int64_t j = keys; j < stride; ++j) scores[j] = -1e30f;
  Vector most = load_vector(scores);
  for (int64_t j = kLanes; j < stride; j += kLanes) {
    const Vector values = load_vector(scores + j);
    most = values > most ? values : most;
  }
  return max_of(most);
}

constexpr int kTogether = 4;  // rows whose chains of dependent operations overlap
static_assert(kBlock % kTogether == 0);

// 2^x for x <= 0: exact to fp32, or, where the result is rounded to bf16, within 5e-6 of itself.
template <class Op>
static inline Vector power(Vector x) {
  return Op::kDepth == 1 ? exp2_negative(x) : exp2_negative<4>(x);
}

// The softmax of kTogether rows of scores, as rows of an A operand that are still to be multiplied by `inverse`.
template <class Op>
static inline void soften(float* scores, int64_t width, int64_t keys, float log2_scale, typename Op::Element* weights,
                          int64_t stride, float* inverse) {
  float highest[kTogether];
  Vector sums[kTogether] = {};
  for (int r = 0; r < kTogether; ++r) highest[r] = highest_of(scores + r * width, width, keys);
  for (int64_t j = 0; j < width; j += kLanes)
#pragma GCC unroll 4
    for (int r = 0; r < kTogether; ++r) {
      const Vector weight = power<Op>((load_vector(scores + r * width + j) - highest[r]) * log2_scale);
      store_operand<Op>(weights + r * stride, j, weight);
      sums[r] += weight;
    }
  for (int r = 0; r < kTogether; ++r) inverse[r] = 1 / sum_of(sums[r]);
}

// The same in the backward pass: weights of kTogether rows, and the slopes of their scores out of those of the weights.
template <class Op>
static inline void slopes_of(float* scores, float* grads, int64_t width, int64_t keys, float log2_scale,
                             typename Op::Element* weights, typename Op::Element* slopes, int64_t stride) {
  float highest[kTogether], inverse[kTogether], mean[kTogether];
  Vector sums[kTogether] = {}, dots[kTogether] = {};
  for (int r = 0; r < kTogether; ++r) highest[r] = highest_of(scores + r * width, width, keys);
  for (int64_t j = 0; j < width; j += kLanes)
#pragma GCC unroll 4
    for (int r = 0; r < kTogether; ++r) {
      const Vector weight = power<Op>((load_vector(scores + r * width + j) - highest[r]) * log2_scale);
      store_vector(scores + r * width + j, weight);
      sums[r] += weight;
      dots[r] += weight * load_vector(grads + r * width + j);
    }
  for (int r = 0; r < kTogether; ++r) {
    inverse[r] = 1 / sum_of(sums[r]);
    mean[r] = sum_of(dots[r]) * inverse[r];
  }
  for (int64_t j = 0; j < width; j += kLanes)
#pragma GCC unroll 4
    for (int r = 0; r < kTogether; ++r) {
      const Vector weight = load_vector(scores + r * width + j) * inverse[r];
      store_operand<Op>(weights + r * stride, j, weight);
      store_operand<Op>(slopes + r * stride, j, weight * (load_vector(grads + r * width + j) - mean[r]));
    }
}

static inline void write_row(const float* x, int64_t columns, float factor, float* out) {
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) out[j] = x[j] * factor;
}

static inline void write_row(const float* x, int64_t columns, float factor, bf16* out) {
  int64_t j = 0;
#ifdef __AVX512BF16__
  for (; j + kLanes <= columns; j += kLanes)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j), (__m256i)_mm512_cvtneps_pbh((__m512)(load_vector(x + j) * factor)));
#endif
  for (; j < columns; ++j) store(out + j, x[j] * factor);
}

template <class T>
static inline void write_rows(const float* x, int64_t x_stride, int64_t rows, int64_t columns, const float* factors,
                              float factor, T* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r) write_row(x + r * x_stride, columns, factors ? factors[r] : factor, out + r * out_stride);
}

template <class T>
static void forward_of(const AttentionShape& s, Heads q, Heads k, Heads v, Heads out) {
  using Op = typename OperandOf<T>::type;
  const int64_t across = depth_of<Op>(s.dim), along = depth_of<Op>(s.keys), key_width = padded(s.keys), width = padded(s.dim);
  const int64_t stride = key_width / Op::kDepth;  // of weights: whole vectors
  const float log2_scale = s.scale * 1.44269504f;
#pragma omp parallel
  {
    Scratch<Op> scratch(s.queries * across + s.keys * across + across * key_width + along * width + kBlock * stride +
                        kBlock * (key_width + width) + 512);
    auto *q_rows = scratch.take(s.queries * across), *k_rows = scratch.take(s.keys * across);
    auto *k_columns = scratch.take(across * key_width), *v_rows = scratch.take(along * width);
    auto* weights = scratch.take(kBlock * stride);
    float *scores = scratch.floats(kBlock * key_width), *sums = scratch.floats(kBlock * width);
    float inverse[kBlock];
#pragma omp for schedule(static)
    for (int64_t task = 0; task < s.batch * s.heads; ++task) {
      const int64_t b = task / s.heads, h = task % s.heads;
      by_rows<Op>(q.at<T>(b, h), q.row_stride, s.queries, s.dim, q_rows);
      by_rows<Op>(k.at<T>(b, h), k.row_stride, s.keys, s.dim, k_rows);
      over_columns<Op>(k_rows, s.keys, s.dim, k_columns);
      over_rows<Op>(v.at<T>(b, h), v.row_stride, s.keys, s.dim, v_rows);
      for (int64_t i = 0; i < s.queries; i += kBlock) {
        const int64_t rows = s.queries - i < kBlock ? s.queries - i : kBlock;
        panel<Op>(q_rows + i * across, across, k_columns, key_width, across, scores, key_width, rows, key_width);
        for (int64_t r = 0; r < rows; r += kTogether)  // rows behind the last one hold what they held before
          soften<Op>(scores + r * key_width, key_width, s.keys, log2_scale, weights + r * stride, stride, inverse + r);
        panel<Op>(weights, stride, v_rows, width, along, sums, width, rows, width);
        write_rows(sums, width, rows, s.dim, inverse, 0, out.at<T>(b, h) + i * out.row_stride, out.row_stride);
      }
    }
  }
}

template <class T>
static void backward_of(const AttentionShape& s, Heads q, Heads k, Heads v, Heads grad, Heads dq, Heads dk, Heads dv) {
  using Op = typename OperandOf<T>::type;
  const int64_t across = depth_of<Op>(s.dim), along = depth_of<Op>(s.keys), key_width = padded(s.keys), width = padded(s.dim);
  const float log2_scale = s.scale * 1.44269504f;
  const int64_t down = depth_of<Op>(s.queries), longest = s.queries > s.keys ? s.queries : s.keys;
  const int64_t stride = key_width / Op::kDepth, together = (s.queries + kTogether - 1) / kTogether * kTogether;
#pragma omp parallel
  {
    Scratch<Op> scratch(2 * s.queries * across + longest * across + 2 * across * key_width + along * width + 2 * down * width +
                        2 * together * stride + s.keys * down + down * key_width + kBlock * (2 * key_width + width) + 512);
    auto *q_rows = scratch.take(s.queries * across), *g_rows = scratch.take(s.queries * across);
    auto *rows_of_it = scratch.take(longest * across);
    auto *k_columns = scratch.take(across * key_width), *v_columns = scratch.take(across * key_width);
    auto *k_over = scratch.take(along * width), *q_over = scratch.take(down * width), *g_over = scratch.take(down * width);
    auto *weights = scratch.take(together * stride), *slopes = scratch.take(together * stride);
    auto *turned = scratch.take(s.keys * down), *pairs = scratch.take(down * key_width);
    float *scores = scratch.floats(kBlock * key_width), *products = scratch.floats(kBlock * key_width);
    float* sums = scratch.floats(kBlock * width);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < s.batch * s.heads; ++task) {
      const int64_t b = task / s.heads, h = task % s.heads;
      by_rows<Op>(q.at<T>(b, h), q.row_stride, s.queries, s.dim, q_rows);
      by_rows<Op>(grad.at<T>(b, h), grad.row_stride, s.queries, s.dim, g_rows);
      by_rows<Op>(k.at<T>(b, h), k.row_stride, s.keys, s.dim, rows_of_it);
      over_columns<Op>(rows_of_it, s.keys, s.dim, k_columns);
      by_rows<Op>(v.at<T>(b, h), v.row_stride, s.keys, s.dim, rows_of_it);
      over_columns<Op>(rows_of_it, s.keys, s.dim, v_columns);
      over_rows<Op>(k.at<T>(b, h), k.row_stride, s.keys, s.dim, k_over);
      over_rows<Op>(q.at<T>(b, h), q.row_stride, s.queries, s.dim, q_over);
      over_rows<Op>(grad.at<T>(b, h), grad.row_stride, s.queries, s.dim, g_over);
      for (int64_t i = 0; i < s.queries; i += kBlock) {
        const int64_t rows = s.queries - i < kBlock ? s.queries - i : kBlock;
        panel<Op>(q_rows + i * across, across, k_columns, key_width, across, scores, key_width, rows, key_width);
        panel<Op>(g_rows + i * across, across, v_columns, key_width, across, products, key_width, rows, key_width);
        for (int64_t r = 0; r < rows; r += kTogether)
          slopes_of<Op>(scores + r * key_width, products + r * key_width, key_width, s.keys, log2_scale,
                        weights + (i + r) * stride, slopes + (i + r) * stride, stride);
        panel<Op>(slopes + i * stride, stride, k_over, width, along, sums, width, rows, width);
        write_rows(sums, width, rows, s.dim, nullptr, s.scale, dq.at<T>(b, h) + i * dq.row_stride, dq.row_stride);
      }
      transposed<Op>(weights, stride, s.queries, s.keys, pairs, turned);
      for (int64_t j = 0; j < s.keys; j += kBlock) {
        const int64_t rows = s.keys - j < kBlock ? s.keys - j : kBlock;
        panel<Op>(turned + j * down, down, g_over, width, down, sums, width, rows, width);
        write_rows(sums, width, rows, s.dim, nullptr, 1, dv.at<T>(b, h) + j * dv.row_stride, dv.row_stride);
      }
      transposed<Op>(slopes, stride, s.queries, s.keys, pairs, turned);
      for (int64_t j = 0; j < s.keys; j += kBlock) {
        const int64_t rows = s.keys - j < kBlock ? s.keys - j : kBlock;
        panel<Op>(turned + j * down, down, q_over, width, down, sums, width, rows, width);
        write_rows(sums, width, rows, s.dim, nullptr, s.scale, dk.at<T>(b, h) + j * dk.row_stride, dk.row_stride);
      }
    }
  }
}

void attention(const AttentionShape& shape, Heads q, Heads k, Heads v, Heads out) {
  (shape.dtype == Dtype::f32 ? forward_of<float> : forward_of<bf16>)(shape, q, k, v, out);
}

void attention_backward(const AttentionShape& shape, Heads q, Heads k, Heads v, Heads grad, Heads dq, Heads dk, Heads dv) {
  (shape.dtype == Dtype::f32 ? backward_of<float> : backward_of<bf16>)(shape, q, k, v, grad, dq, dk, dv);
}

}  // namespace COHOBATE_ISA
}  // namespace cohobate
