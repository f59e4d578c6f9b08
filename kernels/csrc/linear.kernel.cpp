#include "linear.h"

#ifdef __AVX512BF16__
#include <algorithm>

#include "ahead.h"
#include "gelu.h"
#include "tile.h"

namespace cohobate {
namespace COHOBATE_ISA {

// A tile is kRows x kVectors accumulators. B operands are packed in panels of kColumns columns, [depth][kColumns] each, that
// stay in the second-level cache while the rows pass; A operands are rows as they are, or panels of kRows columns of grad.
constexpr int64_t kRows = 8, kVectors = 3, kColumns = kVectors * kLanes;
constexpr int64_t kPack = 16;         // pairs of rows that are packed together
constexpr int64_t kCached = 1 << 17;  // elements of A, half a megabyte, that stay in cache beside a panel of B

struct Operands;  // names the workspace

static inline uint32_t* operands(int64_t elements) { return static_cast<uint32_t*>(workspace<Operands>(elements * 4)); }

// Rows of A in parts: few enough for a part to stay in the second-level cache, and alike to a tile, so that threads end together.
class Parts {
 public:
  Parts(int64_t rows, int64_t depth) : rows_(rows), tiles_((rows + kRows - 1) / kRows) {
    const int64_t most = std::max<int64_t>(4, kCached / std::max<int64_t>(depth, 1) / kRows);
    count_ = (tiles_ + most - 1) / most;
  }
  int64_t count() const { return count_; }
  int64_t begin(int64_t part) const { return std::min(rows_, part * tiles_ / count_ * kRows); }

 private:
  int64_t rows_, tiles_, count_;
};

static inline int64_t panels_of(int64_t columns) { return (columns + kColumns - 1) / kColumns; }

// Pairs (low, high) of sixteen columns, from two rows of bf16 or of fp32.
static inline __m512i interleave(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

static inline __m256i row_part(const bf16* row, __mmask16 mask) { return _mm256_maskz_loadu_epi16(mask, row); }

static inline __m256i row_part(const float* row, __mmask16 mask) {
  return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, row));
}

// Sixteen pairs that are adjacent in memory.
static inline Bits pairs_of(const bf16* x, __mmask16 low, __mmask16 high) {
  return (Bits)_mm512_maskz_loadu_epi16(low | static_cast<__mmask32>(high) << kLanes, x);
}

static inline Bits pairs_of(const float* x, __mmask16 low, __mmask16 high) {
  return (Bits)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(high, x + kLanes), _mm512_maskz_loadu_ps(low, x));
}

// Panels of x [rows, columns], summed over its rows: pairs of rows 2k and 2k + 1, for k in [begin, end). All panels at once,
// so that rows are read whole; meanwhile the block of rows behind them is asked for, and the same pairs of the next panel.
template <class T>
static void pack_over_rows(const T* x, int64_t rows, int64_t columns, int64_t begin, int64_t end, uint32_t* out) {
  const int64_t depth = (rows + 1) / 2, panels = panels_of(columns), after = std::min(rows, 2 * end);
  Ahead block(x + after * columns, x + std::min(rows, after + 2 * kPack) * columns, panels * (end - begin));
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t k = begin; k < end; ++k) {
      block.ask_on();
      for (int64_t v = 0; v < kVectors; ++v) {
        const int64_t column = p * kColumns + v * kLanes;
        const __mmask16 mask = lanes(columns - column);
        const T* low = x + 2 * k * columns + column;
        const __m256i high = 2 * k + 1 < rows ? row_part(low + columns, mask) : _mm256_setzero_si256();
        uint32_t* to = out + (p * depth + k) * kColumns + v * kLanes;
        ask_to_write(to + depth * kColumns);
        _mm512_store_si512(to, interleave(row_part(low, mask), high));
      }
    }
}

// One panel of x [rows, columns], summed over its columns: rows first ... first + kColumns of it become columns.
template <class T>
static void pack_over_columns(const T* x, int64_t rows, int64_t columns, int64_t first, uint32_t* out) {
  const int64_t depth = columns / 2;
  for (int64_t v = 0; v < kVectors; ++v) {
    const int64_t after = std::min(rows, first + (v + 1) * kLanes);
    Ahead strip(x + after * columns, x + std::min(rows, after + kLanes) * columns, (depth + kLanes - 1) / kLanes);
    for (int64_t k = 0; k < depth; k += kLanes) {
      strip.ask_on();
      const int64_t left = std::min(kLanes, depth - k);
      const __mmask16 low = lanes(2 * left), high = lanes(2 * left - kLanes);
      Bits block[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) {
        const int64_t row = first + v * kLanes + r;
        if (row < rows) {
          block[r] = pairs_of(x + row * columns + 2 * k, low, high);
        } else {
          block[r] = Bits{};
        }
      }
      turn(block);
      for (int64_t i = 0; i < left; ++i)
        _mm512_store_si512(out + (k + i) * kColumns + v * kLanes, (__m512i)block[i]);
    }
  }
}

// Panels of kRows columns of grad [rows, columns], pairs of rows [begin, end), and the sums of these rows (null: not wanted).
static void pack_rows(const bf16* grad, int64_t rows, int64_t columns, int64_t begin, int64_t end, uint32_t* out, float* sums) {
  const int64_t depth = (rows + 1) / 2, strips = (columns + kLanes - 1) / kLanes, after = std::min(rows, 2 * end);
  Ahead block(grad + after * columns, grad + std::min(rows, after + 2 * kPack) * columns, strips * (end - begin));
  for (int64_t first = 0; first < columns; first += kLanes) {
    const __mmask16 mask = lanes(columns - first);
    uint32_t* panel = out + first * depth;
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int64_t k = begin; k < end; ++k) {
      block.ask_on();
      const bf16* low = grad + 2 * k * columns + first;
      const __m256i high = 2 * k + 1 < rows ? row_part(low + columns, mask) : _mm256_setzero_si256();
      const __m512i pairs = interleave(row_part(low, mask), high);
      ask_to_write(panel + (2 * depth + k) * kRows);
      ask_to_write(panel + (3 * depth + k) * kRows);
      _mm256_store_si256(reinterpret_cast<__m256i*>(panel + k * kRows), _mm512_castsi512_si256(pairs));
      _mm256_store_si256(reinterpret_cast<__m256i*>(panel + (depth + k) * kRows), _mm512_extracti64x4_epi64(pairs, 1));
      even = _mm512_add_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
      odd = _mm512_add_ps(odd, _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xFFFF0000))));
    }
    if (sums) _mm512_mask_storeu_ps(sums + first, mask, _mm512_add_ps(even, odd));
  }
}

template <int kR, class F>
static inline void tile_of(const uint32_t* a, int64_t a_row, int64_t a_depth, const uint32_t* b, int64_t depth,
                           int64_t vectors, F finish) {
  switch (vectors) {
    case 3: return tile<Pair, kR, 3>(a, a_row, a_depth, b, kColumns, depth, finish);
    case 2: return tile<Pair, kR, 2>(a, a_row, a_depth, b, kColumns, depth, finish);
    default: return tile<Pair, kR, 1>(a, a_row, a_depth, b, kColumns, depth, finish);
  }
}

// finish(r, v, values) of up to kRows rows and kVectors vectors.
template <class F>
static inline void tile_at(const uint32_t* a, int64_t a_row, int64_t a_depth, const uint32_t* b, int64_t depth, int64_t rows,
                           int64_t vectors, F finish) {
  switch (rows) {
    case 8: return tile_of<8>(a, a_row, a_depth, b, depth, vectors, finish);
    case 7: return tile_of<7>(a, a_row, a_depth, b, depth, vectors, finish);
    case 6: return tile_of<6>(a, a_row, a_depth, b, depth, vectors, finish);
    case 5: return tile_of<5>(a, a_row, a_depth, b, depth, vectors, finish);
    case 4: return tile_of<4>(a, a_row, a_depth, b, depth, vectors, finish);
    case 3: return tile_of<3>(a, a_row, a_depth, b, depth, vectors, finish);
    case 2: return tile_of<2>(a, a_row, a_depth, b, depth, vectors, finish);
    default: return tile_of<1>(a, a_row, a_depth, b, depth, vectors, finish);
  }
}

static inline Vector floats(const float* x, __mmask16 mask) { return (Vector)_mm512_maskz_loadu_ps(mask, x); }

static inline Vector floats(const bf16* x, __mmask16 mask) {
  return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16);
}

struct Plain {
  static Vector of(Vector x) { return x; }
};

struct Gelu {
  static Vector of(Vector x) { return gelu_of(x); }
};

// x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): the same as x (1 + tanh u) / 2.
struct GeluTanh {
  static Vector of(Vector x) {
    const Vector u = (x * x * 0.044715f + 1.0f) * x * 1.5957691f;
    const Vector e = exp2_negative((u < 0 ? u : -u) * 1.44269504f);
    return x * (u < 0 ? e : Vector{} + 1.0f) / (e + 1.0f);
  }
};

// out [rows, columns] = Act(A B + bias) in bf16, A being the rows of x as they are and B packed. Inside a parallel region.
template <class Act, class B>
static void rows_times_panels(const bf16* x, const uint32_t* b, const B* bias, bf16* out, int64_t rows, int64_t depth,
                              int64_t columns) {
  const int64_t panels = panels_of(columns);
  const Parts parts(rows, depth);
  const uint32_t* a = reinterpret_cast<const uint32_t*>(x);
#pragma omp for schedule(static)
  for (int64_t task = 0; task < parts.count() * panels; ++task) {
    const int64_t start = parts.begin(task / panels), stop = parts.begin(task / panels + 1);
    const int64_t first = task % panels * kColumns, wide = std::min(kColumns, columns - first);
    const uint32_t* panel = b + task % panels * depth * kColumns;
    Vector shift[kVectors] = {};
    for (int64_t v = 0; bias && v < kVectors; ++v) shift[v] = floats(bias + first + v * kLanes, lanes(wide - v * kLanes));
    for (int64_t i = start; i < stop; i += kRows)
      tile_at(a + i * depth, depth, 1, panel, depth, std::min(kRows, stop - i), padded(wide) / kLanes,
              [&](int r, int v, Vector values) {
                _mm256_mask_storeu_epi16(out + (i + r) * columns + first + v * kLanes, lanes(wide - v * kLanes),
                                         (__m256i)_mm512_cvtneps_pbh((__m512)Act::of(values + shift[v])));
              });
  }
}

void linear(const bf16* x, const float* weight, const float* bias, bf16* out, int64_t rows, int64_t inputs, int64_t outputs) {
  const int64_t depth = inputs / 2, panels = panels_of(outputs);
  uint32_t* b = operands(panels * depth * kColumns);
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels; ++p) pack_over_columns(weight, outputs, inputs, p * kColumns, b + p * depth * kColumns);
    rows_times_panels<Plain>(x, b, bias, out, rows, depth, outputs);
  }
}

int64_t packed_size(int64_t inputs, int64_t outputs) { return panels_of(outputs) * (inputs / 2) * kColumns; }

void linear_pack(const bf16* weight, uint32_t* packed, int64_t inputs, int64_t outputs) {
  const int64_t depth = inputs / 2;
  for (int64_t p = 0; p < panels_of(outputs); ++p)
    pack_over_columns(weight, outputs, inputs, p * kColumns, packed + p * depth * kColumns);
}

void linear_packed(const bf16* x, const uint32_t* packed, const bf16* bias, Activation activation, bf16* out, int64_t rows,
                   int64_t inputs, int64_t outputs) {
#pragma omp parallel
  switch (activation) {
    case Activation::none: rows_times_panels<Plain>(x, packed, bias, out, rows, inputs / 2, outputs); break;
    case Activation::gelu: rows_times_panels<Gelu>(x, packed, bias, out, rows, inputs / 2, outputs); break;
    case Activation::gelu_tanh: rows_times_panels<GeluTanh>(x, packed, bias, out, rows, inputs / 2, outputs); break;
  }
}

void linear_dx(const bf16* grad, const float* weight, bf16* dx, int64_t rows, int64_t inputs, int64_t outputs) {
  const int64_t depth = outputs / 2;
  uint32_t* b = operands(panels_of(inputs) * depth * kColumns);
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t k = 0; k < depth; k += kPack) pack_over_rows(weight, outputs, inputs, k, std::min(depth, k + kPack), b);
    rows_times_panels<Plain>(grad, b, static_cast<const float*>(nullptr), dx, rows, depth, inputs);
  }
}

void linear_dw(const bf16* grad, const bf16* x, float* dweight, float* dbias, int64_t rows, int64_t inputs, int64_t outputs) {
  const int64_t depth = (rows + 1) / 2, panels = panels_of(inputs), strips = (outputs + kLanes - 1) / kLanes;
  const Parts parts(outputs, depth);
  const int64_t packs = (depth + kPack - 1) / kPack;
  uint32_t *a = operands((strips * kLanes + panels * kColumns) * depth + packs * outputs), *b = a + strips * kLanes * depth;
  float* sums = reinterpret_cast<float*>(b + panels * kColumns * depth);
  const bool aligned = inputs % kLanes == 0 && reinterpret_cast<uintptr_t>(dweight) % 64 == 0;
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < packs; ++i) {
      const int64_t begin = i * kPack, end = std::min(depth, begin + kPack);
      pack_over_rows(x, rows, inputs, begin, end, b);
      pack_rows(grad, rows, outputs, begin, end, a, dbias ? sums + i * outputs : nullptr);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < parts.count() * panels; ++task) {
      const int64_t start = parts.begin(task / panels), stop = parts.begin(task / panels + 1);
      const int64_t first = task % panels * kColumns, wide = std::min(kColumns, inputs - first);
      for (int64_t i = start; i < stop; i += kRows)
        tile_at(a + i * depth, 1, kRows, b + task % panels * depth * kColumns, depth, std::min(kRows, stop - i),
                padded(wide) / kLanes, [&](int r, int v, Vector values) {
                  float* to = dweight + (i + r) * inputs + first + v * kLanes;
                  if (aligned)  // past the caches: nobody reads a gradient before they are overwritten
                    _mm512_stream_ps(to, (__m512)values);
                  else
                    _mm512_mask_storeu_ps(to, lanes(wide - v * kLanes), (__m512)values);
                });
    }
  }
  if (!dbias) return;
  std::memset(dbias, 0, outputs * sizeof(float));
  for (int64_t i = 0; i < packs; ++i)
#pragma omp simd
    for (int64_t j = 0; j < outputs; ++j) dbias[j] += sums[i * outputs + j];
}

}  // namespace COHOBATE_ISA
}  // namespace cohobate
#endif
