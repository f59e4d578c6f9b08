#include "attention.h"

#include <algorithm>

#include "tile.h"

namespace cohobate {
namespace COHOBATE_ISA {

// A operands are stored by rows, or turned; B operands by the summed dimension with rows padded to kLanes.
constexpr int64_t kRows = 6, kVectors = 4;  // accumulators of a tile: 24 of 32 registers
constexpr int64_t kTurnedRows = 8;          // of a tile whose A operand is turned, and that is two vectors wide
constexpr int64_t kBlock = 4 * kRows;       // rows that pass together
constexpr int kTogether = 4;                // rows whose chains of dependent operations overlap
static_assert(kBlock % kTogether == 0 && kBlock % kTurnedRows == 0 && kLanes % kTurnedRows == 0);

#ifdef __AVX512BF16__
template <class T> struct OperandOf { using type = Single; };
template <> struct OperandOf<bf16> { using type = Pair; };
#else
template <class T> struct OperandOf { using type = Single; };
#endif

// Where the vectors (r, v) of a product go, from some row and column on: into floats, or into rows of a tensor, each
// multiplied by its factor.
struct Sums {
  float* to;
  int64_t stride;

  Sums at(int64_t row, int64_t column) const { return {to + row * stride + column, stride}; }
  void operator()(int r, int v, Vector values) const { store_vector(to + r * stride + v * kLanes, values); }
};

// The first `left` of sixteen values, or all of them. A call would move accumulators out of their registers; where there are
// not enough registers for them anyway, it is one.
#ifdef __AVX512F__
static inline void write_part(float* to, Vector values, int64_t left) {
  _mm512_mask_storeu_ps(to, lanes(left), (__m512)values);
}

static inline void write_part(bf16* to, Vector values, int64_t left) {
#ifdef __AVX512BF16__
  const __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)values);
#else
  alignas(32) bf16 part[kLanes];
  store_vector(part, values);
  const __m256i half = _mm256_load_si256(reinterpret_cast<const __m256i*>(part));
#endif
  _mm256_mask_storeu_epi16(to, lanes(left), half);
}
#else
template <class T>
[[gnu::noinline]] static void write_part(T* to, const Vector& values, int64_t left) {
  T part[kLanes];
  store_vector(part, values);
  std::memcpy(to, part, (left < kLanes ? left : kLanes) * sizeof(T));
}
#endif

template <class T>
struct Output {
  T* to;
  int64_t stride, columns;
  const float* factors;

  Output at(int64_t row, int64_t column) const {
    return {to + row * stride + column, stride, columns - column, factors + row};
  }
  void operator()(int r, int v, Vector values) const {
    write_part(to + r * stride + v * kLanes, values * factors[r], columns - v * kLanes);
  }
};

template <class Op, int kV, class To>
static inline void tiles(const typename Op::Element* a, int64_t a_stride, const typename Op::Element* b, int64_t b_stride,
                         int64_t depth, int64_t rows, To to) {
  for (int64_t i = 0; i < rows; i += kRows) {
    const auto* from = a + i * a_stride;
    const To write = to.at(i, 0);
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

// A B [rows, columns]; columns are padded. A part of B stays in the first-level cache while all the
// rows pass.
template <class Op, class To>
static void product(const typename Op::Element* a, int64_t a_stride, const typename Op::Element* b, int64_t b_stride,
                    int64_t depth, int64_t rows, int64_t columns, To to) {
  for (int64_t column = 0, take; column < columns; column += take * kLanes) {
    const int64_t left = (columns - column) / kLanes, parts = (left + kVectors - 1) / kVectors;
    take = (left + parts - 1) / parts;  // parts of even width
    switch (take) {
      case 4: tiles<Op, 4>(a, a_stride, b + column, b_stride, depth, rows, to.at(0, column)); break;
      case 3: tiles<Op, 3>(a, a_stride, b + column, b_stride, depth, rows, to.at(0, column)); break;
      case 2: tiles<Op, 2>(a, a_stride, b + column, b_stride, depth, rows, to.at(0, column)); break;
      default: tiles<Op, 1>(a, a_stride, b + column, b_stride, depth, rows, to.at(0, column));
    }
  }
}

// The same for rows [first, last), `first` a multiple of kTurnedRows, of an A operand that is turned: strips of kLanes rows,
// element (row, k) at a[row / kLanes * strip + k * kLanes + row % kLanes]. `to` counts from `first`.
template <class Op, class To>
static void turned_product(const typename Op::Element* a, int64_t strip, const typename Op::Element* b, int64_t b_stride,
                           int64_t depth, int64_t first, int64_t last, int64_t columns, To to) {
  for (int64_t i = first; i < last; i += kTurnedRows) {
    const auto* from = a + i / kLanes * strip + i % kLanes;
    const bool half = last - i <= kTurnedRows / 2;
    for (int64_t column = 0; column < columns; column += 2 * kLanes) {
      const auto write = [part = to.at(i - first, column), there = last - i](int r, int v, Vector values) {
        if (r < there) part(r, v, values);
      };
      const auto* over = b + column;
      switch ((columns - column > kLanes ? 2 : 1) + (half ? 2 : 0)) {
        case 1: tile<Op, kTurnedRows, 1>(from, 1, kLanes, over, b_stride, depth, write); break;
        case 2: tile<Op, kTurnedRows, 2>(from, 1, kLanes, over, b_stride, depth, write); break;
        case 3: tile<Op, kTurnedRows / 2, 1>(from, 1, kLanes, over, b_stride, depth, write); break;
        default: tile<Op, kTurnedRows / 2, 2>(from, 1, kLanes, over, b_stride, depth, write);
      }
    }
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

template <class Element>
struct Rows {
  const Element* data;
  int64_t stride;

  const Element* at(int64_t row) const { return data + row * stride; }
};

// A operand [rows, depth_of(columns)]: the rows where they are, or a copy where they are not made of whole elements.
template <class Op, class T>
static inline Rows<typename Op::Element> by_rows(const T* x, int64_t stride, int64_t rows, int64_t columns,
                                                 typename Op::Element* copy) {
  using Element = typename Op::Element;
  const bool whole = stride % Op::kDepth == 0 && columns % Op::kDepth == 0;
  if (sizeof(T) * Op::kDepth == sizeof(Element) && whole && reinterpret_cast<uintptr_t>(x) % alignof(Element) == 0)
    return {reinterpret_cast<const Element*>(x), stride / Op::kDepth};
  const int64_t depth = depth_of<Op>(columns);
  for (int64_t i = 0; i < rows; ++i) {
    if constexpr (Op::kDepth == 1) {
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) copy[i * depth + j] = load(x + i * stride + j);
    } else {
      copy[i * depth + depth - 1] = 0;  // the second half of the last pair, where the number of columns is odd
      std::memcpy(copy + i * depth, x + i * stride, columns * sizeof(T));
    }
  }
  return {copy, depth};
}

// Sixteen values each of two rows, as pairs; zeros where there is no second row.
static inline Bits pairs_of(const bf16* even, const bf16* odd) {
  typedef uint16_t Half __attribute__((vector_size(kLanes * 2)));
  Half low, high = {};
  std::memcpy(&low, even, sizeof low);
  if (odd) std::memcpy(&high, odd, sizeof high);
  return __builtin_convertvector(low, Bits) | __builtin_convertvector(high, Bits) << 16;
}

// Summed over the rows: B operand [depth_of(rows), padded(columns)].
template <class Op, class T>
static void over_rows(const T* x, int64_t stride, int64_t rows, int64_t columns, typename Op::Element* out) {
  const int64_t width = padded(columns);
  for (int64_t i = 0; i < depth_of<Op>(rows); ++i) {
    typename Op::Element* to = out + i * width;
    const T *row = x + Op::kDepth * i * stride, *second = Op::kDepth * i + 1 < rows ? row + stride : nullptr;
    int64_t j = 0;
    if constexpr (Op::kDepth == 1) {
      for (; j + kLanes <= columns; j += kLanes) store_vector(to + j, load_vector(row + j));
      for (; j < columns; ++j) to[j] = load(row + j);
    } else {
      for (; j + kLanes <= columns; j += kLanes) {
        const Bits pairs = pairs_of(row + j, second ? second + j : nullptr);
        std::memcpy(to + j, &pairs, sizeof pairs);
      }
      const auto *even = reinterpret_cast<const uint16_t*>(row), *odd = reinterpret_cast<const uint16_t*>(second);
      for (; j < columns; ++j) to[j] = even[j] | (odd ? static_cast<uint32_t>(odd[j]) << 16 : 0);
    }
    for (; j < width; ++j) to[j] = 0;
  }
}

#ifdef __AVX512F__
// Sixteen elements of a row of which `left` values are there.
template <class Op>
static inline Bits elements_of(const float* row, int64_t left) {
  return (Bits)_mm512_maskz_loadu_ps(lanes(left), row);
}

template <class Op>
static inline Bits elements_of(const bf16* row, int64_t left) {
  const __mmask32 there = left < 2 * kLanes ? (1u << left) - 1 : ~0u;
  if constexpr (Op::kDepth == 2) return (Bits)_mm512_maskz_loadu_epi16(there, row);
  return (Bits)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, row)), 16);
}
#endif

// Summed over the columns: B operand [depth_of(columns), padded(rows)].
template <class Op, class T>
static void over_columns(const T* x, int64_t stride, int64_t rows, int64_t columns, typename Op::Element* out) {
  const int64_t depth = depth_of<Op>(columns), width = padded(rows);
  for (int64_t i = 0; i < width; i += kLanes) {
#ifdef __AVX512F__
    for (int64_t k = 0; k < depth; k += kLanes) {
      Bits block[kLanes];
      for (int64_t r = 0; r < kLanes; ++r)
        block[r] = i + r < rows ? elements_of<Op>(x + (i + r) * stride + k * Op::kDepth, columns - k * Op::kDepth) : Bits{};
      turn(block);
      for (int64_t c = 0; c < kLanes && k + c < depth; ++c) std::memcpy(out + (k + c) * width + i, &block[c], sizeof(Bits));
    }
#else
    for (int64_t r = i; r < i + kLanes; ++r)
      for (int64_t k = 0; k < depth; ++k) out[k * width + r] = r < rows ? load(x + r * stride + k) : 0.0f;
#endif
  }
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

// Sixteen values of two rows that follow each other, as part of a strip of a turned A operand.
template <class Op>
static inline void store_turned(typename Op::Element* to, Vector first, Vector second) {
#ifdef __AVX512BF16__
  if constexpr (Op::kDepth == 2) {
    typedef int16_t Halves __attribute__((vector_size(kLanes * 4)));
    constexpr Halves order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16((__m512i)order, halves));
    return;
  }
#endif
  std::memcpy(to, &first, sizeof first);
  std::memcpy(to + kLanes, &second, sizeof second);
}

static inline Vector larger(Vector a, Vector b) {
#ifdef __AVX512F__
  return (Vector)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// The largest score of a row; the padding becomes so small that its weight is zero.
static inline float highest_of(float* scores, int64_t width, int64_t keys) {
  constexpr Bits lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  float* last = scores + width - kLanes;
  Vector most = lane < int32_t(keys - width + kLanes) ? load_vector(last) : Vector{} - 1e30f;
  store_vector(last, most);
  for (int64_t j = 0; j < width - kLanes; j += kLanes) most = larger(load_vector(scores + j), most);
  return max_of(most);
}

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

// The same in the backward pass: weights of kTogether rows, and the slopes of their scores out of those of the weights. Both
// as strips of a turned A operand, the slopes by rows as well.
template <class Op>
static inline void slopes_of(float* scores, float* grads, int64_t width, int64_t keys, float log2_scale,
                             typename Op::Element* weights, typename Op::Element* slopes, int64_t strip,
                             typename Op::Element* slope_rows, int64_t stride) {
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
    for (int r = 0; r < kTogether; r += 2) {
      Vector weight[2], slope[2];
#pragma GCC unroll 2
      for (int o = 0; o < 2; ++o) {
        weight[o] = load_vector(scores + (r + o) * width + j) * inverse[r + o];
        slope[o] = weight[o] * (load_vector(grads + (r + o) * width + j) - mean[r + o]);
        store_operand<Op>(slope_rows + (r + o) * stride, j, slope[o]);
      }
      const int64_t at = j / kLanes * strip + r / Op::kDepth * kLanes;
      store_turned<Op>(weights + at, weight[0], weight[1]);
      store_turned<Op>(slopes + at, slope[0], slope[1]);
    }
}

// Fetch rows [first, last): of a result that is written next, or of the head that is read next.
// The rows of a head lie too far apart for the processor to guess the next one.
template <bool kWrite, class T>
static inline void fetch(const T* x, int64_t stride, int64_t first, int64_t last, int64_t columns) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = first; i < last; ++i)
    for (int64_t j = 0; j < columns; j += line) __builtin_prefetch(x + i * stride + j, kWrite, 3);
}

template <class T>
static void forward_of(const AttentionShape& s, Heads q, Heads k, Heads v, Heads out) {
  using Op = typename OperandOf<T>::type;
  const int64_t across = depth_of<Op>(s.dim), along = depth_of<Op>(s.keys);
  const int64_t key_width = padded(s.keys), width = padded(s.dim);
  const int64_t stride = key_width / Op::kDepth;  // of weights: whole vectors
  const float log2_scale = s.scale * 1.44269504f;
  const int64_t tasks = s.batch * s.heads;
#pragma omp parallel
  {
    Scratch<Op> scratch(s.queries * across + across * key_width + along * width + kBlock * (stride + key_width) + 512);
    auto* q_copy = scratch.take(s.queries * across);
    auto *k_columns = scratch.take(across * key_width), *v_rows = scratch.take(along * width);
    auto* weights = scratch.take(kBlock * stride);
    float* scores = scratch.floats(kBlock * key_width);
    float inverse[kBlock];
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t b = task / s.heads, h = task % s.heads;
      const int64_t next = std::min(task + 1, tasks - 1), next_b = next / s.heads, next_h = next % s.heads;
      over_columns<Op>(k.at<T>(b, h), k.row_stride, s.keys, s.dim, k_columns);
      over_rows<Op>(v.at<T>(b, h), v.row_stride, s.keys, s.dim, v_rows);
      const auto q_rows = by_rows<Op>(q.at<T>(b, h), q.row_stride, s.queries, s.dim, q_copy);
      T* to = out.at<T>(b, h);
      for (int64_t i = 0; i < s.queries; i += kBlock) {
        const int64_t rows = std::min(kBlock, s.queries - i);
        const int64_t first = s.keys * i / s.queries, last = s.keys * (i + rows) / s.queries;
        fetch<true>(to, out.row_stride, i, i + rows, s.dim);
        fetch<false>(q.at<T>(next_b, next_h), q.row_stride, i, i + rows, s.dim);
        fetch<false>(k.at<T>(next_b, next_h), k.row_stride, first, last, s.dim);
        fetch<false>(v.at<T>(next_b, next_h), v.row_stride, first, last, s.dim);
        product<Op>(q_rows.at(i), q_rows.stride, k_columns, key_width, across, rows, key_width, Sums{scores, key_width});
        for (int64_t r = 0; r < rows; r += kTogether)  // rows behind the last one hold what they held before
          soften<Op>(scores + r * key_width, key_width, s.keys, log2_scale, weights + r * stride, stride, inverse + r);
        product<Op>(weights, stride, v_rows, width, along, rows, width,
                    Output<T>{to + i * out.row_stride, out.row_stride, s.dim, inverse});
      }
    }
  }
}

template <class T>
static void backward_of(const AttentionShape& s, Heads q, Heads k, Heads v, Heads grad, Heads dq, Heads dk, Heads dv) {
  using Op = typename OperandOf<T>::type;
  const int64_t across = depth_of<Op>(s.dim), along = depth_of<Op>(s.keys);
  const int64_t key_width = padded(s.keys), width = padded(s.dim);
  const float log2_scale = s.scale * 1.44269504f;
  const int64_t down = depth_of<Op>(s.queries), together = (s.queries + kTogether - 1) / kTogether * kTogether;
  const int64_t stride = key_width / Op::kDepth, strip = together / Op::kDepth * kLanes, strips = key_width / kLanes;
  const int64_t tasks = s.batch * s.heads;
#pragma omp parallel
  {
    Scratch<Op> scratch(2 * s.queries * across + 2 * across * key_width + along * width + 2 * down * width +
                        2 * strips * strip + kBlock * (stride + 2 * key_width) + 512);
    auto *q_copy = scratch.take(s.queries * across), *g_copy = scratch.take(s.queries * across);
    auto *k_columns = scratch.take(across * key_width), *v_columns = scratch.take(across * key_width);
    auto *k_over = scratch.take(along * width), *q_over = scratch.take(down * width), *g_over = scratch.take(down * width);
    auto *weights = scratch.take(strips * strip), *slopes = scratch.take(strips * strip);
    auto* slope_rows = scratch.take(kBlock * stride);
    float *scores = scratch.floats(kBlock * key_width), *products = scratch.floats(kBlock * key_width);
    float ones[kBlock], scales[kBlock];
    std::fill_n(ones, kBlock, 1.0f);
    std::fill_n(scales, kBlock, s.scale);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t b = task / s.heads, h = task % s.heads;
      const int64_t next = std::min(task + 1, tasks - 1), next_b = next / s.heads, next_h = next % s.heads;
      over_columns<Op>(k.at<T>(b, h), k.row_stride, s.keys, s.dim, k_columns);
      over_columns<Op>(v.at<T>(b, h), v.row_stride, s.keys, s.dim, v_columns);
      over_rows<Op>(k.at<T>(b, h), k.row_stride, s.keys, s.dim, k_over);
      over_rows<Op>(q.at<T>(b, h), q.row_stride, s.queries, s.dim, q_over);
      over_rows<Op>(grad.at<T>(b, h), grad.row_stride, s.queries, s.dim, g_over);
      const auto q_rows = by_rows<Op>(q.at<T>(b, h), q.row_stride, s.queries, s.dim, q_copy);
      const auto g_rows = by_rows<Op>(grad.at<T>(b, h), grad.row_stride, s.queries, s.dim, g_copy);
      T *to_q = dq.at<T>(b, h), *to_k = dk.at<T>(b, h), *to_v = dv.at<T>(b, h);
      for (int64_t i = 0; i < s.queries; i += kBlock) {
        const int64_t rows = std::min(kBlock, s.queries - i);
        const int64_t first = s.keys * i / s.queries, last = s.keys * (i + rows) / s.queries;
        fetch<true>(to_q, dq.row_stride, i, i + rows, s.dim);
        fetch<false>(q.at<T>(next_b, next_h), q.row_stride, i, i + rows, s.dim);
        fetch<false>(grad.at<T>(next_b, next_h), grad.row_stride, i, i + rows, s.dim);
        fetch<false>(k.at<T>(next_b, next_h), k.row_stride, first, last, s.dim);
        fetch<false>(v.at<T>(next_b, next_h), v.row_stride, first, last, s.dim);
        product<Op>(q_rows.at(i), q_rows.stride, k_columns, key_width, across, rows, key_width, Sums{scores, key_width});
        product<Op>(g_rows.at(i), g_rows.stride, v_columns, key_width, across, rows, key_width, Sums{products, key_width});
        for (int64_t r = rows; r % kTogether; ++r) {  // what is paired with the last query
          std::memset(scores + r * key_width, 0, key_width * sizeof(float));
          std::memset(products + r * key_width, 0, key_width * sizeof(float));
        }
        for (int64_t r = 0; r < rows; r += kTogether)
          slopes_of<Op>(scores + r * key_width, products + r * key_width, key_width, s.keys, log2_scale,
                        weights + (i + r) / Op::kDepth * kLanes, slopes + (i + r) / Op::kDepth * kLanes, strip,
                        slope_rows + r * stride, stride);
        product<Op>(slope_rows, stride, k_over, width, along, rows, width,
                    Output<T>{to_q + i * dq.row_stride, dq.row_stride, s.dim, scales});
      }
      for (int64_t i = 0; i < s.keys; i += kBlock) {
        const int64_t last = std::min(s.keys, i + kBlock);
        fetch<true>(to_v, dv.row_stride, i, last, s.dim);
        fetch<true>(to_k, dk.row_stride, i, last, s.dim);
        turned_product<Op>(weights, strip, g_over, width, down, i, last, width,
                           Output<T>{to_v + i * dv.row_stride, dv.row_stride, s.dim, ones});
        turned_product<Op>(slopes, strip, q_over, width, down, i, last, width,
                           Output<T>{to_k + i * dk.row_stride, dk.row_stride, s.dim, scales});
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
