#include "rows.h"

#include <algorithm>
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

// A task writes one chunk of a sample's output rows, each once: it looks up which input row, if any, goes there.
void put(const char* x, int64_t x_batch_stride, int64_t x_row_stride, const int32_t* rows, int64_t rows_stride, char* out,
         int64_t batch, int64_t count, int64_t length, int64_t width) {
  constexpr int64_t chunk = 64;
  const int64_t chunks = (length + chunk - 1) / chunk;
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < batch * chunks; ++task) {
    const int64_t b = task / chunks, first = task % chunks * chunk, size = std::min(chunk, length - first);
    int64_t source[chunk];
    std::fill_n(source, size, -1);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t place = rows[b * rows_stride + j] - first;
      if (place >= 0 && place < size) source[place] = j;
    }
    for (int64_t k = 0; k < size; ++k) {
      char* target = out + (b * length + first + k) * width;
      if (source[k] < 0)
        std::memset(target, 0, width);
      else
        std::memcpy(target, x + b * x_batch_stride + source[k] * x_row_stride, width);
    }
  }
}

}  // namespace COHOBATE_ISA
}  // namespace cohobate
