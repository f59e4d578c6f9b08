#include "attention.h"

#include <cmath>
#include <cstring>
#include <memory>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace cohobate {
namespace COHOBATE_ISA {

// Every product C = A B runs on operands of 32-bit elements: a float, or a pair of bf16 that are adjacent along the summed
// dimension (one instruction multiplies and adds both). A is stored by rows; B by the summed dimension, rows padded to kLanes.
constexpr int64_t kLanes = 16, kRows = 6, kVectors = 4;  // accumulators of a tile: 24 of 32 registers

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef int32_t Bits __attribute__((vector_size(kLanes * 4)));

static inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

static inline Vector load_vector(const float* from) {
  Vector values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

static inline void store_vector(float* to, Vector values) { std::memcpy(to, &values, sizeof values); }

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
  return reduce(values, [](float a, float b) { return a + b; });
}

static inline float max_of(Vector values) {
  return reduce(values, [](float a, float b) { return a > b ? a : b; });
}

struct Single {
  using Element = float;
  static constexpr int64_t kDepth = 1;  // summed values in an element
  static void multiply_add(Vector& acc, Element a, const Element* b) {
    acc += load_vector(b) * a;
  }
};

#ifdef __AVX512BF16__
struct Pair {
  using Element = uint32_t;
  static constexpr int64_t kDepth = 2;
  static void multiply_add(Vector& acc, Element a, const Element* b) {
    acc = (Vector)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(b), (__m512bh)_mm512_set1_epi32(a));
  }
};
template <class T> struct OperandOf { using type = Single; };
template <> struct OperandOf<bf16> { using type = Pair; };
#else
template <class T> struct OperandOf { using type = Single; };
#endif

// C [kR rows, kV vectors] = A [kR, depth] B [depth, kV vectors]; each value is summed in the order of the depth.
template <class Op, int kR, int kV>
static inline void tile(const typename Op::Element* a, int64_t a_stride, const typename Op::Element* b, int64_t b_stride,
                        int64_t depth, float* c, int64_t c_stride) {
  Vector acc[kR][kV] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const typename Op::Element* row = b + k * b_stride;
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const typename Op::Element value = a[r * a_stride + k];
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) Op::multiply_add(acc[r][v], value, row + v * kLanes);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kV; ++v) store_vector(c + r * c_stride + v * kLanes, acc[r][v]);
}

template <class Op, int kR>
static inline void tile_row(const typename Op::Element* a, int64_t a_stride, const typename Op::Element* b, int64_t b_stride,
                            int64_t depth, float* c, int64_t c_stride, int64_t columns) {
  int64_t left = columns / kLanes, done = 0;
  while (left > 0) {
    const int64_t tiles = (left + kVectors - 1) / kVectors, take = (left + tiles - 1) / tiles;  // tiles of even width
    const auto* from = b + done * kLanes;
    float* to = c + done * kLanes;
    switch (take) {
      case 4: tile<Op, kR, 4>(a, a_stride, from, b_stride, depth, to, c_stride); break;
      case 3: tile<Op, kR, 3>(a, a_stride, from, b_stride, depth, to, c_stride); break;
      case 2: tile<Op, kR, 2>(a, a_stride, from, b_stride, depth, to, c_stride); break;
      default: tile<Op, kR, 1>(a, a_stride, from, b_stride, depth, to, c_stride);
    }
    done += take;
    left -= take;
  }
}

// C [rows, columns] for up to kRows rows; columns are padded.
template <class Op>
static void panel(const typename Op::Element* a, int64_t a_stride, const typename Op::Element* b, int64_t b_stride,
                  int64_t depth, float* c, int64_t c_stride, int64_t rows, int64_t columns) {
  switch (rows) {
    case 6: return tile_row<Op, 6>(a, a_stride, b, b_stride, depth, c, c_stride, columns);
    case 5: return tile_row<Op, 5>(a, a_stride, b, b_stride, depth, c, c_stride, columns);
    case 4: return tile_row<Op, 4>(a, a_stride, b, b_stride, depth, c, c_stride, columns);
    case 3: return tile_row<Op, 3>(a, a_stride, b, b_stride, depth, c, c_stride, columns);
    case 2: return tile_row<Op, 2>(a, a_stride, b, b_stride, depth, c, c_stride, columns);
    default: return tile_row<Op, 1>(a, a_stride, b, b_stride, depth, c, c_stride, columns);
  }
}

// 2^x for x <= 0, within 2 ulp; 0, or less than 1e-37, where x is below -126.
static inline Vector exp2_negative(Vector x) {
#ifdef __AVX512F__
  const Vector n = (Vector)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = x < -126.0f ? Vector{} - 126.0f : x;
  const Vector n = (x + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: no bits are left for a fraction
#endif
  const Vector r = x - n;
  Vector p = r * 1.535336188e-4f + 1.339887440e-3f;
  p = p * r + 9.618437358e-3f;
  p = p * r + 5.550332471e-2f;
  p = p * r + 2.402264791e-1f;
  p = p * r + 6.931472029e-1f;
  p = p * r + 1.0f;
#ifdef __AVX512F__
  return (Vector)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * (Vector)((__builtin_convertvector(n, Bits) + 127) << 23);
#endif
}

// Memory of one thread, allocated once a call: operands of one head in the layouts above.
template <class Op>
class Scratch {
 public:
  using Element = typename Op::Element;

  explicit Scratch(int64_t elements) : data_(new Element[elements + 64]) {
    const auto address = reinterpret_cast<uintptr_t>(data_.get());
    next_ = data_.get() + (64 - address % 64) % 64 / sizeof(Element);
  }
  Element* take(int64_t elements) {
    Element* start = next_;
    next_ += (elements + 31) / 16 * 16;  // room for a vector that starts at the last element
    return start;
  }
  float* floats(int64_t count) { return reinterpret_cast<float*>(take(count)); }

 private:
  std::unique_ptr<Element[]> data_;
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

#ifdef __AVX512F__
// Sixteen rows of sixteen become columns: four rounds that each swap half of the lanes between pairs of rows.
static inline void turn(Bits* rows) {
#pragma GCC unroll 4
  for (int distance = 8; distance >= 1; distance /= 2) {
    Bits low, high;
    for (int l = 0; l < kLanes; ++l) {
      low[l] = l & distance ? kLanes + l - distance : l;
      high[l] = l & distance ? kLanes + l : l + distance;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & distance) continue;
      const Bits first = rows[i], second = rows[i + distance];
      rows[i] = __builtin_shuffle(first, second, low);
      rows[i + distance] = __builtin_shuffle(first, second, high);
    }
  }
}
#endif

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

// One row of fp32 values, zero up to padded(columns), as a row of an A operand. Writes up to kLanes values too many, which
// the next row, or the end of the scratch memory, takes.
template <class Op>
static inline void row_operand(const float* x, int64_t columns, typename Op::Element* out) {
#ifdef __AVX512BF16__
  if constexpr (Op::kDepth == 2) {
    for (int64_t j = 0; j < columns; j += kLanes)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j / 2), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + j)));
    return;
  }
#endif
  std::memcpy(out, x, columns * sizeof(float));
}

// A operand [columns, depth_of(rows)] of the transpose of an A operand [rows, depth_of(columns)].
template <class Op>
static void transposed(const typename Op::Element* x, int64_t rows, int64_t columns, typename Op::Element* pairs,
                       typename Op::Element* out) {
  if constexpr (Op::kDepth == 1) {
    (void)pairs;
    transpose(x, columns, rows, columns, out, rows);
  } else {
    const int64_t stride = 2 * depth_of<Op>(columns), height = depth_of<Op>(rows), width = padded(columns);
    over_rows<Op>(reinterpret_cast<const bf16*>(x), stride, rows, columns, pairs);
    transpose(pairs, width, height, columns, out, height);
  }
}

// The weights of one block of rows, from their scores: e^(scale (s - max)), zero in the padding, and the inverse of each sum.
static inline void softmax(float* scores, int64_t stride, int64_t rows, int64_t keys, float scale, float* inverse) {
  const float log2_scale = scale * 1.44269504f;
  for (int64_t r = 0; r < rows; ++r) {
    float* s = scores + r * stride;
    for (int64_t j = keys; j < stride; ++j) s[j] = -1e30f;
    Vector most = load_vector(s);
    for (int64_t j = kLanes; j < stride; j += kLanes) {
      const Vector values = load_vector(s + j);
      most = values > most ? values : most;
    }
    const float highest = max_of(most);
    Vector sum = {};
    for (int64_t j = 0; j < stride; j += kLanes) {
      const Vector weights = exp2_negative((load_vector(s + j) - highest) * log2_scale);
      store_vector(s + j, weights);
      sum += weights;
    }
    for (int64_t j = keys; j < stride; ++j) s[j] = 0;
    inverse[r] = 1 / sum_of(sum);
  }
}

template <class T>
static inline void write_rows(const float* x, int64_t x_stride, int64_t rows, int64_t columns, const float* factors,
                              float factor, T* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const float by = factors ? factors[r] : factor;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) store(out + r * out_stride + j, x[r * x_stride + j] * by);
  }
}

template <class T>
static void forward_of(const AttentionShape& s, Heads q, Heads k, Heads v, Heads out) {
  using Op = typename OperandOf<T>::type;
  const int64_t across = depth_of<Op>(s.dim), along = depth_of<Op>(s.keys), key_width = padded(s.keys), width = padded(s.dim);
#pragma omp parallel
  {
    Scratch<Op> scratch(s.queries * across + s.keys * across + across * key_width + along * width + kRows * along +
                        kRows * (key_width + width) + 512);
    auto *q_rows = scratch.take(s.queries * across), *k_rows = scratch.take(s.keys * across);
    auto *k_columns = scratch.take(across * key_width), *v_rows = scratch.take(along * width);
    auto* weights = scratch.take(kRows * along);
    float *scores = scratch.floats(kRows * key_width), *sums = scratch.floats(kRows * width);
    float inverse[kRows];
#pragma omp for schedule(static)
    for (int64_t task = 0; task < s.batch * s.heads; ++task) {
      const int64_t b = task / s.heads, h = task % s.heads;
      by_rows<Op>(q.at<T>(b, h), q.row_stride, s.queries, s.dim, q_rows);
      by_rows<Op>(k.at<T>(b, h), k.row_stride, s.keys, s.dim, k_rows);
      over_columns<Op>(k_rows, s.keys, s.dim, k_columns);
      over_rows<Op>(v.at<T>(b, h), v.row_stride, s.keys, s.dim, v_rows);
      for (int64_t i = 0; i < s.queries; i += kRows) {
        const int64_t rows = s.queries - i < kRows ? s.queries - i : kRows;
        panel<Op>(q_rows + i * across, across, k_columns, key_width, across, scores, key_width, rows, key_width);
        softmax(scores, key_width, rows, s.keys, s.scale, inverse);
        for (int64_t r = 0; r < rows; ++r) row_operand<Op>(scores + r * key_width, s.keys, weights + r * along);
        panel<Op>(weights, along, v_rows, width, along, sums, width, rows, width);
        write_rows(sums, width, rows, s.dim, inverse, 0, out.at<T>(b, h) + i * out.row_stride, out.row_stride);
      }
    }
  }
}

template <class T>
static void backward_of(const AttentionShape& s, Heads q, Heads k, Heads v, Heads grad, Heads dq, Heads dk, Heads dv) {
  using Op = typename OperandOf<T>::type;
  const int64_t across = depth_of<Op>(s.dim), along = depth_of<Op>(s.keys), key_width = padded(s.keys), width = padded(s.dim);
  const int64_t down = depth_of<Op>(s.queries), longest = s.queries > s.keys ? s.queries : s.keys;
#pragma omp parallel
  {
    Scratch<Op> scratch(2 * s.queries * across + longest * across + 2 * across * key_width + along * width + 2 * down * width +
                        2 * s.queries * along + s.keys * down + down * key_width + kRows * (2 * key_width + width) + 512);
    auto *q_rows = scratch.take(s.queries * across), *g_rows = scratch.take(s.queries * across);
    auto *rows_of_it = scratch.take(longest * across);
    auto *k_columns = scratch.take(across * key_width), *v_columns = scratch.take(across * key_width);
    auto *k_over = scratch.take(along * width), *q_over = scratch.take(down * width), *g_over = scratch.take(down * width);
    auto *weights = scratch.take(s.queries * along), *slopes = scratch.take(s.queries * along);
    auto *turned = scratch.take(s.keys * down), *pairs = scratch.take(down * key_width);
    float *scores = scratch.floats(kRows * key_width), *products = scratch.floats(kRows * key_width);
    float* sums = scratch.floats(kRows * width);
    float inverse[kRows];
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
      for (int64_t i = 0; i < s.queries; i += kRows) {
        const int64_t rows = s.queries - i < kRows ? s.queries - i : kRows;
        panel<Op>(q_rows + i * across, across, k_columns, key_width, across, scores, key_width, rows, key_width);
        softmax(scores, key_width, rows, s.keys, s.scale, inverse);
        panel<Op>(g_rows + i * across, across, v_columns, key_width, across, products, key_width, rows, key_width);
        for (int64_t r = 0; r < rows; ++r) {
          float *p = scores + r * key_width, *g = products + r * key_width;
          Vector sum = {};
          for (int64_t j = 0; j < key_width; j += kLanes) {
            const Vector weights = load_vector(p + j) * inverse[r];
            store_vector(p + j, weights);
            sum += weights * load_vector(g + j);
          }
          const float mean = sum_of(sum);
          row_operand<Op>(p, s.keys, weights + (i + r) * along);
#pragma omp simd
          for (int64_t j = 0; j < key_width; ++j) g[j] = p[j] * (g[j] - mean);
          row_operand<Op>(g, s.keys, slopes + (i + r) * along);
        }
        panel<Op>(slopes + i * along, along, k_over, width, along, sums, width, rows, width);
        write_rows(sums, width, rows, s.dim, nullptr, s.scale, dq.at<T>(b, h) + i * dq.row_stride, dq.row_stride);
      }
      transposed<Op>(weights, s.queries, s.keys, pairs, turned);
      for (int64_t j = 0; j < s.keys; j += kRows) {
        const int64_t rows = s.keys - j < kRows ? s.keys - j : kRows;
        panel<Op>(turned + j * down, down, g_over, width, down, sums, width, rows, width);
        write_rows(sums, width, rows, s.dim, nullptr, 1, dv.at<T>(b, h) + j * dv.row_stride, dv.row_stride);
      }
      transposed<Op>(slopes, s.queries, s.keys, pairs, turned);
      for (int64_t j = 0; j < s.keys; j += kRows) {
        const int64_t rows = s.keys - j < kRows ? s.keys - j : kRows;
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
