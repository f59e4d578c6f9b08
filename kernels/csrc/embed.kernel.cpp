#include "embed.h"

#include <algorithm>
#include <vector>

namespace cohobate {
namespace COHOBATE_ISA {

template <class T>
static void epilogue(T* out, int64_t batch, int64_t count, int64_t width, const int32_t* rows, int64_t rows_stride,
                     const float* bias, const float* positions) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < batch * count; ++i) {
    const int64_t b = i / count, j = i % count;
    T* __restrict to = out + i * width;
    const float* __restrict position = positions + (rows ? rows[b * rows_stride + j] : j) * width;
    if (bias && positions)
      for (int64_t k = 0; k < width; ++k) store(to + k, load(to + k) + (bias[k] + position[k]));
    else if (bias)
      for (int64_t k = 0; k < width; ++k) store(to + k, load(to + k) + bias[k]);
    else
      for (int64_t k = 0; k < width; ++k) store(to + k, load(to + k) + position[k]);
  }
}

void embed_epilogue(void* out, Dtype dtype, int64_t batch, int64_t count, int64_t width, const int32_t* rows,
                    int64_t rows_stride, const float* bias, const float* positions) {
  if (!bias && !positions) return;
  if (dtype == Dtype::f32)
    epilogue(static_cast<float*>(out), batch, count, width, rows, rows_stride, bias, positions);
  else
    epilogue(static_cast<bf16*>(out), batch, count, width, rows, rows_stride, bias, positions);
}

constexpr int64_t kColumns = 64;  // columns a task sums: four cache lines of a row in fp32

template <class T>
static void sums(const T* grad, int64_t grad_stride_b, int64_t grad_stride_n, int64_t batch, int64_t count, int64_t width,
                 const int32_t* rows, int64_t rows_stride, int64_t length, float* bias_grad, float* positions_grad) {
#pragma omp parallel
  {
    std::vector<float> table(length * kColumns);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < (width + kColumns - 1) / kColumns; ++task) {
      const int64_t first = task * kColumns, columns = std::min(kColumns, width - first);
      std::fill(table.begin(), table.end(), 0.0f);
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t j = 0; j < count; ++j) {
          const T* __restrict from = grad + b * grad_stride_b + j * grad_stride_n + first;
          float* __restrict sum = table.data() + (rows ? rows[b * rows_stride + j] : j) * kColumns;
          for (int64_t k = 0; k < columns; ++k) sum[k] += load(from + k);
        }
      if (positions_grad)
        for (int64_t r = 0; r < length; ++r)
          std::copy_n(table.data() + r * kColumns, columns, positions_grad + r * width + first);
      if (bias_grad) {
        float total[kColumns] = {};
        for (int64_t r = 0; r < length; ++r)
          for (int64_t k = 0; k < kColumns; ++k) total[k] += table[r * kColumns + k];
        std::copy_n(total, columns, bias_grad + first);
      }
    }
  }
}

void embed_sums(const void* grad, Dtype dtype, int64_t grad_stride_b, int64_t grad_stride_n, int64_t batch, int64_t count,
                int64_t width, const int32_t* rows, int64_t rows_stride, int64_t length, float* bias_grad,
                float* positions_grad) {
  if (dtype == Dtype::f32)
    sums(static_cast<const float*>(grad), grad_stride_b, grad_stride_n, batch, count, width, rows, rows_stride, length,
         bias_grad, positions_grad);
  else
    sums(static_cast<const bf16*>(grad), grad_stride_b, grad_stride_n, batch, count, width, rows, rows_stride, length,
         bias_grad, positions_grad);
}

}  // namespace COHOBATE_ISA
}  // namespace cohobate
