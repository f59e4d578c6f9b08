#include "assemble.h"

#include <cstring>

namespace cohobate {
namespace COHOBATE_ISA {
namespace {

template <typename T>
void forward(const Assembly& a, const T* x, int64_t x_batch_stride, int64_t x_row_stride, const float* mask_token,
             const float* positions, T* out) {
  const int64_t length = a.prefix + a.count;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < a.batch * length; ++i) {
    const int64_t b = i / length, row = i % length, source = source_row(a, b, row);
    const T* from = x + b * x_batch_stride + source * x_row_stride;
    T* to = out + i * a.width;
    const int64_t place = row < a.prefix || a.raster ? row : a.prefix + a.rows[b * a.rows_stride + row - a.prefix];
    const float* shift = positions + place * a.width;
    if (source >= 0 && positions)
      for (int64_t k = 0; k < a.width; ++k) store(to + k, load(from + k) + shift[k]);
    else if (source >= 0)
      std::memcpy(to, from, a.width * sizeof(T));
    else if (positions)
      for (int64_t k = 0; k < a.width; ++k) store(to + k, mask_token[k] + shift[k]);
    else
      for (int64_t k = 0; k < a.width; ++k) store(to + k, mask_token[k]);
  }
}

template <typename T>
void backward(const Assembly& a, const T* grad, int64_t grad_batch_stride, int64_t grad_row_stride, int64_t chunk, T* dx,
              float* partial) {
  const int64_t length = a.prefix + a.count, chunks = (length + chunk - 1) / chunk;
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < a.batch * chunks; ++task) {
    const int64_t b = task / chunks, first = task % chunks * chunk;
    const int64_t last = first + chunk < length ? first + chunk : length;
    float* sum = partial + task * a.width;
    if (partial) std::memset(sum, 0, a.width * sizeof(float));
    for (int64_t row = first; row < last; ++row) {
      const T* from = grad + b * grad_batch_stride + row * grad_row_stride;
      const int64_t target = source_row(a, b, row);
      if (target >= 0)
        std::memcpy(dx + (b * (a.prefix + a.visible) + target) * a.width, from, a.width * sizeof(T));
      else if (partial)
        for (int64_t k = 0; k < a.width; ++k) sum[k] += load(from + k);
    }
  }
}

template <typename T>
void add_rows(const T* source, int64_t batch_stride, int64_t row_stride, const int32_t* index, int64_t index_stride,
              int64_t batch, int64_t length, int64_t prefix, int64_t width, float* out) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < length; ++row) {
    float* sum = out + row * width;
    std::memset(sum, 0, width * sizeof(float));
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t place = index && row >= prefix ? index[b * index_stride + row - prefix] : row - prefix;
      if (index && row >= prefix && place < 0) continue;
      const T* from = source + b * batch_stride + (prefix + place) * row_stride;
      for (int64_t k = 0; k < width; ++k) sum[k] += load(from + k);
    }
  }
}

}  // namespace

void assemble(const Assembly& a, const void* x, int64_t x_batch_stride, int64_t x_row_stride, const float* mask_token,
              const float* positions, void* out, Dtype dtype) {
  if (dtype == Dtype::f32)
    forward(a, static_cast<const float*>(x), x_batch_stride, x_row_stride, mask_token, positions, static_cast<float*>(out));
  else
    forward(a, static_cast<const bf16*>(x), x_batch_stride, x_row_stride, mask_token, positions, static_cast<bf16*>(out));
}

void assemble_backward(const Assembly& a, const void* grad, int64_t grad_batch_stride, int64_t grad_row_stride, int64_t chunk,
                       void* dx, float* partial, Dtype dtype) {
  if (dtype == Dtype::f32)
    backward(a, static_cast<const float*>(grad), grad_batch_stride, grad_row_stride, chunk, static_cast<float*>(dx), partial);
  else
    backward(a, static_cast<const bf16*>(grad), grad_batch_stride, grad_row_stride, chunk, static_cast<bf16*>(dx), partial);
}

void tree_sum(float* rows, int64_t count, int64_t width) {
  while (count > 1) {
    const int64_t half = (count + 1) / 2;
#pragma omp parallel for schedule(static)
    for (int64_t r = half; r < count; ++r)
      for (int64_t k = 0; k < width; ++k) rows[(r - half) * width + k] += rows[r * width + k];
    count = half;
  }
}

void sum_rows(const void* source, int64_t batch_stride, int64_t row_stride, const int32_t* index, int64_t index_stride,
              int64_t batch, int64_t length, int64_t prefix, int64_t width, float* out, Dtype dtype) {
  if (dtype == Dtype::f32)
    add_rows(static_cast<const float*>(source), batch_stride, row_stride, index, index_stride, batch, length, prefix, width, out);
  else
    add_rows(static_cast<const bf16*>(source), batch_stride, row_stride, index, index_stride, batch, length, prefix, width, out);
}

}  // namespace COHOBATE_ISA
}  // namespace cohobate
