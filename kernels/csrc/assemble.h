// assemble and its gradients; formulas in kernels/tokens/assemble.py. Strides are in elements.
#pragma once

#include <cstdint>

#include "isa.h"
#include "number.h"

namespace cohobate {

struct Assembly {
  const int32_t* rows;
  int64_t rows_stride;
  int64_t batch, visible, count, prefix, width;  // visible and count without the prefix rows
  bool raster;
};

// Row of x that output row i of sample b copies, or -1 where the mask token stands.
static inline int64_t source_row(const Assembly& a, int64_t b, int64_t i) {
  if (i < a.prefix) return i;
  const int64_t place = a.raster ? a.rows[b * a.rows_stride + i - a.prefix] : i - a.prefix;
  return place < a.visible ? a.prefix + place : -1;
}

}  // namespace cohobate

COHOBATE_KERNELS(
    // positions may be null.
    void assemble(const Assembly& a, const void* x, int64_t x_batch_stride, int64_t x_row_stride, const float* mask_token,
                  const float* positions, void* out, Dtype dtype);
    // partial: [batch * chunks, width] sums over the masked rows of each chunk, or null where they are not wanted.
    void assemble_backward(const Assembly& a, const void* grad, int64_t grad_batch_stride, int64_t grad_row_stride,
                           int64_t chunk, void* dx, float* partial, Dtype dtype);
    // Sum of `count` rows by halving, into the first one; the others are overwritten.
    void tree_sum(float* rows, int64_t count, int64_t width);
    // out[r] = sum over b of source[b, r], or of source[b, prefix + index[b, r - prefix]] where that is not negative.
    void sum_rows(const void* source, int64_t batch_stride, int64_t row_stride, const int32_t* index, int64_t index_stride,
                  int64_t batch, int64_t length, int64_t prefix, int64_t width, float* out, Dtype dtype);)
