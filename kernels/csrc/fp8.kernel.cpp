#include "fp8.h"

namespace cohobate {
namespace COHOBATE_ISA {
namespace {

template <class From, class To>
void convert(const From* x, int64_t stride, int64_t rows, int64_t width, float factor, To* out) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const From* __restrict from = x + i * stride;
    To* __restrict to = out + i * width;
#pragma omp simd
    for (int64_t k = 0; k < width; ++k) store(to + k, load(from + k) * factor);
  }
}

}  // namespace

void quantise(const void* x, Dtype dtype, int64_t stride, int64_t rows, int64_t width, float inverse, fp8* out) {
  if (dtype == Dtype::f32)
    convert(static_cast<const float*>(x), stride, rows, width, inverse, out);
  else
    convert(static_cast<const bf16*>(x), stride, rows, width, inverse, out);
}

void dequantise(const fp8* x, int64_t stride, int64_t rows, int64_t width, float scale, void* out, Dtype dtype) {
  if (dtype == Dtype::f32)
    convert(x, stride, rows, width, scale, static_cast<float*>(out));
  else
    convert(x, stride, rows, width, scale, static_cast<bf16*>(out));
}

}  // namespace COHOBATE_ISA
}  // namespace cohobate
