// AdamW over a list of tensors, and the sum of squares of a list, cut into chunks of equal size.
#pragma once

#include <cstdint>

#include "isa.h"
#include "number.h"

namespace cohobate {

constexpr int64_t kAdamwChunk = 1 << 14;  // values of a task; shapes the tree of the norm, so it is the same everywhere

// Values [begin, begin + size) of one tensor, size <= kAdamwChunk.
struct AdamwChunk {
  float *parameter, *exp_avg, *exp_avg_sq;
  const void* gradient;
  bf16* shadow;      // null: none
  int64_t size;
  float keep;        // 1 - rate * weight decay
  float rate;        // rate / (1 - beta1^step)
  float correction;  // 1 / sqrt(1 - beta2^step)
};

struct AdamwNumbers {
  float inverse;  // of what the gradients are divided by
  float rest1, beta2, rest2, eps;  // rest: 1 - beta
};

struct SquaresChunk {
  const void* values;
  int64_t size;
  Dtype dtype;
};

}  // namespace cohobate

COHOBATE_KERNELS(
    // The update of every chunk; gradients have one dtype.
    void adamw(const AdamwChunk* chunks, int64_t count, Dtype gradient, const AdamwNumbers& numbers);
    // Shadows alone, of parameters as they are.
    void adamw_shadows(const AdamwChunk* chunks, int64_t count);
    // Sum of squares of each chunk.
    void squares(const SquaresChunk* chunks, int64_t count, float* sums);)
