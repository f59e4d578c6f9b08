// align_loss of one layer: target statistics, loss and gradient of a row while the row is in cache.
#pragma once

#include <cstdint>

#include "isa.h"
#include "number.h"

namespace cohobate {

enum class AlignKind { smooth_l1 = 0, mse = 1, l1 = 2, cosine = 3 };

// A [batch, length, width] tensor whose last stride is 1, and the rows of it that the loss reads (null: all of them).
struct AlignRows {
  const void* data;
  Dtype dtype;
  int64_t batch_stride, row_stride, length;
  const int32_t* rows;
  int64_t rows_stride;

  int64_t row(int64_t b, int64_t j) const { return rows ? rows[b * rows_stride + j] : j; }
};

struct AlignLayer {
  AlignRows prediction, target;
  int64_t batch, count, width;  // count: rows a sample
  AlignKind kind;
  float beta;
  bool standardise, eps_inside;
  float ddof, eps;
  float scale;  // of the gradient
  void* grad;   // [batch, prediction.length, width] in the prediction's dtype, contiguous; null: not wanted
};

}  // namespace cohobate

// Writes the loss of each row, summed over its values, to row_losses [batch * count], and the whole of layer.grad: its rows
// that the loss does not read become zero. is_read [batch * prediction.length] says which it reads.
COHOBATE_KERNELS(void align(const AlignLayer& layer, const uint8_t* is_read, float* row_losses);)
