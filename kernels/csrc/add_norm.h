// add_norm and its gradients; formulas in kernels/transformer/add_norm.py. Strides are in elements.
#pragma once

#include <cstdint>

#include "isa.h"
#include "number.h"

namespace cohobate {

// A [batch, length, width] tensor whose last stride is 1; data may be null where the tensor is optional.
struct NormRows {
  const void* data;
  Dtype dtype;
  int64_t batch_stride, row_stride;
};

struct NormShape {
  int64_t batch, length, width;
};

enum class NormOut { f32 = 0, bf16 = 1, fp8 = 2 };

struct AddNorm {
  NormShape shape;
  NormRows x, branch;
  const float *factor, *weight, *bias;  // [batch], [width], [width], or null
  float eps, inverse;                   // inverse: 1 / scale of an fp8 result
  void* sum;                            // in x's dtype; null without a branch
  void* normed;
  NormOut normed_dtype;
  float *mean, *rstd;  // [batch * length]
};

struct AddNormBackward {
  NormShape shape;
  NormRows grad_sum, grad_normed, sum;  // grad_sum may be null
  const float *mean, *rstd, *factor, *weight;
  void *dx, *dbranch;  // dbranch may be null
  Dtype dbranch_dtype;
  int64_t chunk;   // rows whose weight and bias gradients are added by one task
  float* affine;   // [2, width]: sums over the rows of grad_normed * normalised, then of grad_normed; null: not wanted
};

}  // namespace cohobate

COHOBATE_KERNELS(void add_norm(const AddNorm& a); void add_norm_backward(const AddNormBackward& a);)
