#include "rows.h"

#include <cstring>

namespace cohobate {
namespace COHOBATE_ISA {

void take(const char* x, int64_t x_batch_stride, int64_t x_row_stride, const int32_t* rows, int64_t rows_stride, char* out,
          int64_t batch, int64_t count, int64_t width) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < batch * count; ++i) {
    const int64_t b = i / count, j = i % count;
    std::memcpy(out + i * width, x + b * x_batch_stride + rows[b * rows_stride + j] * x_row_stride, width);
  }
}

void put(const char* x, int64_t x_batch_stride, int64_t x_row_stride, const int32_t* rows, int64_t rows_stride, char* out,
         int64_t batch, int64_t count, int64_t length, int64_t width) {
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < batch; ++b) {
    char* sample = out + b * length * width;
    std::memset(sample, 0, length * width);
    for (int64_t j = 0; j < count; ++j)
      std::memcpy(sample + rows[b * rows_stride + j] * width, x + b * x_batch_stride + j * x_row_stride, width);
  }
}

}  // namespace COHOBATE_ISA
}  // namespace cohobate
