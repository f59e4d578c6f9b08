// Softmax attention of short sequences: softmax(q k^T * scale) v, forward and backward, one head at a time in cache.
#pragma once

#include <cstdint>

#include "isa.h"
#include "number.h"

namespace cohobate {

// A [batch, length, heads, dim] tensor; the values of a head are adjacent.
struct Heads {
  void* data;
  int64_t batch_stride, row_stride, head_stride;  // in values

  template <class T>
  T* at(int64_t b, int64_t h) const {
    return static_cast<T*>(data) + b * batch_stride + h * head_stride;
  }
};

struct AttentionShape {
  int64_t batch, heads, queries, keys, dim;
  float scale;
  Dtype dtype;  // of every tensor
};

}  // namespace cohobate

// The backward pass computes the scores anew and writes the whole of dq, dk and dv. Results do not depend on the number of
// threads, and a row of the output depends on its own query alone, not on how many others there are.
COHOBATE_KERNELS(void attention(const AttentionShape& shape, Heads q, Heads k, Heads v, Heads out);
                 void attention_backward(const AttentionShape& shape, Heads q, Heads k, Heads v, Heads grad, Heads dq, Heads dk,
                                         Heads dv);)
