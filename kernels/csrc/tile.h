// What products on the CPU are built of: a tile of accumulators, and the layouts of its operands.
//
// C = A B runs on operands of 32-bit elements: a float, or a pair of bf16 that are adjacent along the summed dimension (one
// instruction multiplies and adds both). Included by *.kernel.cpp files alone, inside their namespace.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "vector.h"

namespace cohobate {
namespace COHOBATE_ISA {

static inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// 2^x for x <= 0, within 2 ulp (kDegree 6) or 5e-6 (kDegree 4), and 1 at 0; 0, or less than 1e-37, where x is below -126.
template <int kDegree = 6>
static inline Vector exp2_negative(Vector x) {
#ifdef __AVX512F__
  const Vector n = (Vector)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = x < -126.0f ? Vector{} - 126.0f : x;
  const Vector n = (x + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: no bits are left for a fraction
#endif
  const Vector r = x - n;
  Vector p;
  if constexpr (kDegree == 4) {
    p = r * 0.00958285345f + 0.0559064276f;
    p = p * r + 0.240240986f;
    p = p * r + 0.693124193f;
    p = p * r + 1.0f;
  } else {
    p = r * 1.535336188e-4f + 1.339887440e-3f;
    p = p * r + 9.618437358e-3f;
    p = p * r + 5.550332471e-2f;
    p = p * r + 2.402264791e-1f;
    p = p * r + 6.931472029e-1f;
    p = p * r + 1.0f;
  }
#ifdef __AVX512F__
  return (Vector)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * (Vector)((__builtin_convertvector(n, Bits) + 127) << 23);
#endif
}

// Memory that a thread keeps from call to call: fresh pages cost more than what is written to them. One block a Use.
template <class Use>
static inline void* workspace(size_t bytes) {
  struct Block {
    void* data = nullptr;
    size_t size = 0;
    ~Block() { std::free(data); }
  };
  thread_local Block block;
  if (block.size < bytes) {
    std::free(block.data);
    constexpr size_t page = 1 << 21;
    block.size = (bytes + page - 1) / page * page;
    block.data = std::aligned_alloc(page, block.size);
    if (!block.data) block.size = 0, throw std::bad_alloc();
#ifdef __linux__
    madvise(block.data, block.size, MADV_HUGEPAGE);
#endif
  }
  return block.data;
}

struct Single {
  using Element = float;
  static constexpr int64_t kDepth = 1;  // summed values in an element
  static void multiply_add(Vector& acc, Element a, const Element* b) { acc += load_vector(b) * a; }
};

#ifdef __AVX512BF16__
struct Pair {
  using Element = uint32_t;
  static constexpr int64_t kDepth = 2;
  static void multiply_add(Vector& acc, Element a, const Element* b) {
    acc = (Vector)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(b), (__m512bh)_mm512_set1_epi32(a));
  }
};
#endif

// finish(r, v, values) for every vector of C [kR rows, kV vectors] = A B. Element (r, k) of A is at a[r * a_row + k * a_depth],
// row k of B at b + k * b_depth. Each value is summed in the order of the depth.
template <class Op, int kR, int kV, class F>
static inline void tile(const typename Op::Element* a, int64_t a_row, int64_t a_depth, const typename Op::Element* b,
                        int64_t b_depth, int64_t depth, F finish) {
  Vector acc[kR][kV] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const typename Op::Element* row = b + k * b_depth;
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const typename Op::Element value = a[r * a_row + k * a_depth];
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) Op::multiply_add(acc[r][v], value, row + v * kLanes);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kV; ++v) finish(r, v, acc[r][v]);
}

#ifdef __AVX512F__
// The first `count` lanes, all of them, or none.
static inline __mmask16 lanes(int64_t count) { return count >= kLanes ? 0xFFFF : count <= 0 ? 0 : (1u << count) - 1; }

// Swap half of the lanes between rows that lie `kDistance` apart.
template <int kDistance>
static inline void swap_lanes(Bits* rows) {
  static constexpr auto source = [](int lane, bool upper) {
    return upper ? (lane & kDistance ? int(kLanes) + lane : lane + kDistance)
                 : (lane & kDistance ? int(kLanes) + lane - kDistance : lane);
  };
#define COHOBATE_LANES(u)                                                                                                  \
  {source(0, u), source(1, u), source(2, u),  source(3, u),  source(4, u),  source(5, u),  source(6, u),  source(7, u),    \
   source(8, u), source(9, u), source(10, u), source(11, u), source(12, u), source(13, u), source(14, u), source(15, u)}
  constexpr Bits low = COHOBATE_LANES(false), high = COHOBATE_LANES(true);
#undef COHOBATE_LANES
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kDistance) continue;
    const Bits first = rows[i], second = rows[i + kDistance];
    rows[i] = __builtin_shuffle(first, second, low);
    rows[i + kDistance] = __builtin_shuffle(first, second, high);
  }
}

// Sixteen rows of sixteen become columns.
static inline void turn(Bits* rows) {
  swap_lanes<8>(rows);
  swap_lanes<4>(rows);
  swap_lanes<2>(rows);
  swap_lanes<1>(rows);
}
#endif

}  // namespace COHOBATE_ISA
}  // namespace cohobate
