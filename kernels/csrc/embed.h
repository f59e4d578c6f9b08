// What embed_patches does around its matrix product: bias and position rows forward, their gradients backward.
#pragma once

#include <cstdint>

#include "isa.h"
#include "number.h"

COHOBATE_KERNELS(
    // out[b, j] += bias + positions[rows[b, j]]; bias or positions may be null, rows null means rows[b, j] = j.
    void embed_epilogue(void* out, Dtype dtype, int64_t batch, int64_t count, int64_t width, const int32_t* rows,
                        int64_t rows_stride, const float* bias, const float* positions);
    // positions_grad[r] = sum of grad[b, j] over rows[b, j] == r; bias_grad = sum over all of them. Either may be null.
    // Every column is summed by one thread: samples in order, then the length position rows in order.
    void embed_sums(const void* grad, Dtype dtype, int64_t grad_stride_b, int64_t grad_stride_n, int64_t batch, int64_t count,
                    int64_t width, const int32_t* rows, int64_t rows_stride, int64_t length, float* bias_grad,
                    float* positions_grad);)
