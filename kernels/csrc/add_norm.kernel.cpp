#include "add_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "fp8.h"

namespace cohobate {
namespace COHOBATE_ISA {
namespace {

constexpr int64_t kLanes = 64;  // partial sums of a row: the same tree for every instruction set

// Sums of value(i)[0] and value(i)[1] over i below count.
struct Pair {
  float first, second;
};

template <class F>
inline Pair sums_of(int64_t count, F value) {
  float first[kLanes] = {}, second[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
#pragma omp simd
    for (int64_t k = 0; k < kLanes; ++k) {
      const Pair pair = value(i + k);
      first[k] += pair.first;
      second[k] += pair.second;
    }
  for (int64_t k = 0; i + k < count; ++k) {
    const Pair pair = value(i + k);
    first[k] += pair.first;
    second[k] += pair.second;
  }
  float a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
  for (int64_t k = 0; k < kLanes; ++k) {
    a += first[k];
    b += second[k];
  }
  return {a, b};
}

inline const char* row_of(const NormRows& rows, int64_t b, int64_t j) {
  const int64_t size = rows.dtype == Dtype::f32 ? 4 : 2;
  return static_cast<const char*>(rows.data) + (b * rows.batch_stride + j * rows.row_stride) * size;
}

// sum = x + factor * branch in x's dtype; row: the same in fp32, which stays in the first cache.
template <class X, class Branch>
void add_row(const void* x, const void* branch, float factor, void* sum, float* __restrict row, int64_t width) {
  const X* __restrict from = static_cast<const X*>(x);
  const Branch* __restrict added = static_cast<const Branch*>(branch);
  X* __restrict to = static_cast<X*>(sum);
#pragma omp simd
  for (int64_t k = 0; k < width; ++k) {
    X rounded;
    store(&rounded, load(from + k) + factor * load(added + k));
    to[k] = rounded;
    row[k] = load(&rounded);
  }
}

template <class X>
void copy_row(const void* x, const void*, float, void*, float* __restrict row, int64_t width) {
  const X* __restrict from = static_cast<const X*>(x);
#pragma omp simd
  for (int64_t k = 0; k < width; ++k) row[k] = load(from + k);
}

template <class Out>
void normalise_row(const float* __restrict row, float mean, float rstd, const float* __restrict weight,
                   const float* __restrict bias, float inverse, void* normed, int64_t width) {
  Out* __restrict to = static_cast<Out*>(normed);
#pragma omp simd
  for (int64_t k = 0; k < width; ++k)
    store(to + k, ((row[k] - mean) * rstd * weight[k] + bias[k]) * inverse);  // inverse is 1 but for fp8
}

// n: the gradient of the normalised row, h: the row normalised again, both fp32.
template <class Out, class X>
void reload_row(const void* grad, const void* sum, float mean, float rstd, float* __restrict n, float* __restrict h,
                int64_t width) {
  const Out* __restrict from = static_cast<const Out*>(grad);
  const X* __restrict total = static_cast<const X*>(sum);
#pragma omp simd
  for (int64_t k = 0; k < width; ++k) {
    n[k] = load(from + k);
    h[k] = (load(total + k) - mean) * rstd;
  }
}

// dx = grad_sum + rstd * (n * weight - c1 - h * c2); kSum: there is a grad_sum; kBranch: dbranch is wanted.
template <class X, class Branch, bool kSum, bool kBranch>
void gradient_row(const void* grad_sum, const float* __restrict n, const float* __restrict h,
                  const float* __restrict weight, Pair c, float rstd, float factor, void* dx, void* dbranch, int64_t width) {
  const X* __restrict incoming = static_cast<const X*>(grad_sum);
  X* __restrict to = static_cast<X*>(dx);
  Branch* __restrict branch = static_cast<Branch*>(dbranch);
#pragma omp simd
  for (int64_t k = 0; k < width; ++k) {
    float value = rstd * (n[k] * weight[k] - c.first - h[k] * c.second);
    if constexpr (kSum) value += load(incoming + k);
    store(to + k, value);
    if constexpr (kBranch) store(branch + k, factor * value);
  }
}

template <class X, class Branch>
auto gradient_row_for(bool has_sum, bool wants_branch) {
  if (has_sum) return wants_branch ? gradient_row<X, Branch, true, true> : gradient_row<X, Branch, true, false>;
  return wants_branch ? gradient_row<X, Branch, false, true> : gradient_row<X, Branch, false, false>;
}

}  // namespace

void add_norm(const AddNorm& a) {
  const auto [batch, length, width] = a.shape;
  const bool wide_x = a.x.dtype == Dtype::f32, wide_branch = a.branch.dtype == Dtype::f32;
  const auto add = !a.branch.data ? (wide_x ? copy_row<float> : copy_row<bf16>)
                   : wide_branch  ? (wide_x ? add_row<float, float> : add_row<bf16, float>)
                                  : (wide_x ? add_row<float, bf16> : add_row<bf16, bf16>);
  const auto normalise = a.normed_dtype == NormOut::f32    ? normalise_row<float>
                         : a.normed_dtype == NormOut::bf16 ? normalise_row<bf16>
                                                           : normalise_row<fp8>;
  const int64_t size = wide_x ? 4 : 2, normed_size = a.normed_dtype == NormOut::f32 ? 4 : a.normed_dtype == NormOut::bf16 ? 2 : 1;
  const std::vector<float> ones(a.weight ? 0 : width, 1.0f), zeros(a.bias ? 0 : width, 0.0f);
  const float *weight = a.weight ? a.weight : ones.data(), *bias = a.bias ? a.bias : zeros.data();
#pragma omp parallel
  {
    std::vector<float> buffer(width);
    float* row = buffer.data();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < batch * length; ++i) {
      const int64_t b = i / length, j = i % length;
      add(row_of(a.x, b, j), a.branch.data ? row_of(a.branch, b, j) : nullptr, a.factor ? a.factor[b] : 1.0f,
          static_cast<char*>(a.sum) + (a.sum ? i * width * size : 0), row, width);
      const float mean = sums_of(width, [=](int64_t k) { return Pair{row[k], 0.0f}; }).first / width;
      const float squares = sums_of(width, [=](int64_t k) { return Pair{(row[k] - mean) * (row[k] - mean), 0.0f}; }).first;
      const float rstd = 1 / std::sqrt(squares / width + a.eps);
      a.mean[i] = mean;
      a.rstd[i] = rstd;
      normalise(row, mean, rstd, weight, bias, a.inverse, static_cast<char*>(a.normed) + i * width * normed_size, width);
    }
  }
}

void add_norm_backward(const AddNormBackward& a) {
  const auto [batch, length, width] = a.shape;
  const bool wide_x = a.sum.dtype == Dtype::f32, wide_out = a.grad_normed.dtype == Dtype::f32;
  const bool wide_branch = a.dbranch_dtype == Dtype::f32, has_sum = a.grad_sum.data, wants_branch = a.dbranch;
  const auto reload = wide_out ? (wide_x ? reload_row<float, float> : reload_row<float, bf16>)
                               : (wide_x ? reload_row<bf16, float> : reload_row<bf16, bf16>);
  const auto gradient =
      wide_x ? (wide_branch ? gradient_row_for<float, float> : gradient_row_for<float, bf16>)(has_sum, wants_branch)
             : (wide_branch ? gradient_row_for<bf16, float> : gradient_row_for<bf16, bf16>)(has_sum, wants_branch);
  const int64_t size = wide_x ? 4 : 2, branch_size = wide_branch ? 4 : 2;
  const int64_t rows = batch * length, chunks = (rows + a.chunk - 1) / a.chunk;
  const std::vector<float> ones(a.weight ? 0 : width, 1.0f);
  const float* weight = a.weight ? a.weight : ones.data();
#pragma omp parallel
  {
    std::vector<float> buffer(2 * width);
    float *n = buffer.data(), *h = n + width;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < chunks; ++task) {
      float* __restrict dweight = a.partial ? a.partial + task * 2 * width : nullptr;
      float* __restrict dbias = a.partial ? dweight + width : nullptr;
      if (a.partial) std::fill_n(dweight, 2 * width, 0.0f);
      for (int64_t i = task * a.chunk; i < std::min(rows, (task + 1) * a.chunk); ++i) {
        const int64_t b = i / length, j = i % length;
        const float rstd = a.rstd[i];
        reload(row_of(a.grad_normed, b, j), row_of(a.sum, b, j), a.mean[i], rstd, n, h, width);
        if (a.partial)
#pragma omp simd
          for (int64_t k = 0; k < width; ++k) {
            dweight[k] += n[k] * h[k];
            dbias[k] += n[k];
          }
        const Pair sums = sums_of(width, [=](int64_t k) { return Pair{n[k] * weight[k], n[k] * weight[k] * h[k]}; });
        gradient(has_sum ? row_of(a.grad_sum, b, j) : nullptr, n, h, weight, {sums.first / width, sums.second / width}, rstd,
                 a.factor ? a.factor[b] : 1.0f, static_cast<char*>(a.dx) + i * width * size,
                 static_cast<char*>(a.dbranch) + (wants_branch ? i * width * branch_size : 0), width);
      }
    }
  }
}

}  // namespace COHOBATE_ISA
}  // namespace cohobate
