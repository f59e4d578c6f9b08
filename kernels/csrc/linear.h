// bf16 products of a linear layer whose weight is fp32: cast while it is packed, weight gradient in fp32. Only for processors
// with avx512_bf16; every matrix is contiguous.
#pragma once

#include <cstdint>

#include "isa.h"
#include "number.h"

namespace cohobate {
namespace avx512bf16 {

// out [rows, outputs] = x [rows, inputs] weight^T + bias (null: none). inputs is even.
void linear(const bf16* x, const float* weight, const float* bias, bf16* out, int64_t rows, int64_t inputs, int64_t outputs);

// The same with a weight that was packed before, into packed_size(...) elements, and an activation of the sum.
enum class Activation { none = 0, gelu = 1, gelu_tanh = 2 };
int64_t packed_size(int64_t inputs, int64_t outputs);
void linear_pack(const bf16* weight, uint32_t* packed, int64_t inputs, int64_t outputs);
void linear_packed(const bf16* x, const uint32_t* packed, const bf16* bias, Activation activation, bf16* out, int64_t rows,
                   int64_t inputs, int64_t outputs);

// dx [rows, inputs] = grad [rows, outputs] weight. outputs is even.
void linear_dx(const bf16* grad, const float* weight, bf16* dx, int64_t rows, int64_t inputs, int64_t outputs);
// dweight [outputs, inputs] = grad^T x, dbias [outputs] (null: not wanted) = column sums of grad.
void linear_dw(const bf16* grad, const bf16* x, float* dweight, float* dbias, int64_t rows, int64_t inputs, int64_t outputs);

}  // namespace avx512bf16
}  // namespace cohobate
