// bias_gelu and its gradients; formulas in kernels/transformer/activation.py. Strides are in elements.
#pragma once

#include <cstdint>

#include "isa.h"
#include "number.h"

namespace cohobate {

// x and the results are [rows, width], the results contiguous; bias fp32 [width].
struct BiasGelu {
  const void* x;
  Dtype dtype;
  int64_t stride, rows, width;
  const float* bias;
  bool tanh;
};

}  // namespace cohobate

COHOBATE_KERNELS(
    // out: in x's dtype, or float8 of the result times `inverse`.
    void bias_gelu(const BiasGelu& a, void* out, bool is_fp8, float inverse);
    // partial: [chunks of rows, width] sums of dx, or null where they are not wanted.
    void bias_gelu_backward(const BiasGelu& a, const void* grad, int64_t grad_stride, void* dx, int64_t chunk,
                            float* partial);)
