#include "add_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "sweep.h"
#include "tile.h"

namespace cohobate {
namespace COHOBATE_ISA {
namespace {

constexpr int64_t kAhead = 1;     // rows that are asked for before they are needed
constexpr int64_t kColumns = 64;  // of the weight and bias gradients that one task adds over all chunks

struct Partial;  // names the workspace

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Rows of an optional tensor: at(i) is null where there is none.
struct Rows {
  const NormRows rows;
  const int64_t length, count;

  const char* at(int64_t i) const {
    if (!rows.data) return nullptr;
    i = std::min(i, count - 1);
    const int64_t offset = i / length * rows.batch_stride + i % length * rows.row_stride;
    return static_cast<const char*>(rows.data) + offset * size_of(rows.dtype);
  }
};

inline Wide inside(Wide values, std::integral_constant<int64_t, kWide>) {
  return values;
}

// Lanes behind a row's end become 0.
inline Wide inside(Wide values, int64_t count) {
  float lanes[kWide];
  store_wide(lanes, values);
  return load_part(lanes, count);
}

// A row of the sum in fp32, and the total of its values.
struct Summed {
  const float* row;
  float total;
};

// sum = x + factor * branch in x's dtype; buffer: for the row, where the sum is not fp32 itself.
template <class X, class Branch>
Summed add_row(const char* x, const char* branch, float factor, void* sum, float* buffer, int64_t width, const char* next_x,
               const char* next_branch) {
  const X* from = reinterpret_cast<const X*>(x);
  const Branch* added = reinterpret_cast<const Branch*>(branch);
  X* to = static_cast<X*>(sum);
  Wide total = {};
  each_vector(width, [&](int64_t k, auto count) {
    ask(next_x + k * sizeof(X));
    ask(next_branch + k * sizeof(Branch));
    store_part(to + k, load_part(from + k, count) + load_part(added + k, count) * factor, count);
    const Wide rounded = load_part(to + k, count);
    if constexpr (!std::is_same_v<X, float>) store_part(buffer + k, rounded, count);
    total += rounded;
  });
  if constexpr (std::is_same_v<X, float>) return {to, total_of(total)};
  return {buffer, total_of(total)};
}

template <class X>
Summed read_row(const char* x, const char*, float, void*, float* buffer, int64_t width, const char* next_x, const char*) {
  const X* from = reinterpret_cast<const X*>(x);
  Wide total = {};
  each_vector(width, [&](int64_t k, auto count) {
    ask(next_x + k * sizeof(X));
    const Wide values = load_part(from + k, count);
    if constexpr (!std::is_same_v<X, float>) store_part(buffer + k, values, count);
    total += values;
  });
  if constexpr (std::is_same_v<X, float>) return {from, total_of(total)};
  return {buffer, total_of(total)};
}

template <class Out>
void normalise_row(const float* row, float mean, float rstd, const float* weight, const float* bias, float inverse,
                   void* normed, int64_t width) {
  Out* to = static_cast<Out*>(normed);
  each_vector(width, [=](int64_t k, auto count) {
    ask_to_write(to + kAhead * width + k);
    const Wide h = (load_part(row + k, count) - mean) * rstd;
    store_part(to + k, (h * load_part(weight + k, count) + load_part(bias + k, count)) * inverse, count);
  });  // inverse is 1 but for fp8
}

// What a row's gradient needs: grad is that of the normalised row, h the row normalised again, n = grad * weight.
template <class Out, class X>
struct Reader {
  const Out* grad;
  const X* sum;
  const float* weight;
  float mean, rstd;

  template <class Count>
  Wide h(int64_t k, Count count) const {
    return inside((load_part(sum + k, count) - mean) * rstd, count);
  }
};

struct Means {
  float first, second;
};

struct Next {
  const char *grad, *sum, *grad_sum;
};

// Means of n and of n h; dweight and dbias (null: not wanted) get the row's share.
template <class Out, class X>
Means read_gradient(const char* grad, const char* sum, float mean, float rstd, const float* weight, float* dweight,
                   float* dbias, int64_t width, const Next& next) {
  const Reader<Out, X> row{reinterpret_cast<const Out*>(grad), reinterpret_cast<const X*>(sum), weight, mean, rstd};
  Wide first = {}, second = {};
  each_vector(width, [&](int64_t k, auto count) {
    ask(next.grad + k * sizeof(Out));
    ask(next.sum + k * sizeof(X));
    if (next.grad_sum) ask(next.grad_sum + k * sizeof(X));
    const Wide g = load_part(row.grad + k, count), h = row.h(k, count), n = g * load_part(weight + k, count);
    first += n;
    second += n * h;
    if (!dweight) return;
    store_part(dweight + k, load_part(dweight + k, count) + g * h, count);
    store_part(dbias + k, load_part(dbias + k, count) + g, count);
  });
  return {total_of(first) / width, total_of(second) / width};
}

// dx = grad_sum + rstd * (n - c1 - h * c2); kSum: there is a grad_sum; kBranch: dbranch is wanted.
template <class Out, class X, class Branch>
void write_gradient(const char* grad, const char* sum, const char* grad_sum, float mean, float rstd, const float* weight,
                    Means c, float factor, void* dx, void* dbranch, int64_t width) {
  const Reader<Out, X> row{reinterpret_cast<const Out*>(grad), reinterpret_cast<const X*>(sum), weight, mean, rstd};
  const X* incoming = reinterpret_cast<const X*>(grad_sum);
  X* to = static_cast<X*>(dx);
  Branch* branch = static_cast<Branch*>(dbranch);
  each_vector(width, [=](int64_t k, auto count) {
    ask_to_write(to + kAhead * width + k);
    if (branch) ask_to_write(branch + kAhead * width + k);
    const Wide n = load_part(row.grad + k, count) * load_part(weight + k, count);
    Wide value = (n - c.first - row.h(k, count) * c.second) * rstd;
    if (incoming) value += load_part(incoming + k, count);
    store_part(to + k, value, count);
    if (branch) store_part(branch + k, value * factor, count);
  });
}

template <class Out, class X>
auto write_for(bool wide_branch) {
  return wide_branch ? write_gradient<Out, X, float> : write_gradient<Out, X, bf16>;
}

// Columns [first, last) of the sum of `count` rows, by halving: the tree of tree_sum.
void sum_columns(float* rows, int64_t count, int64_t width, int64_t first, int64_t last, float* out) {
  while (count > 1) {
    const int64_t half = (count + 1) / 2;
    for (int64_t r = half; r < count; ++r) {
      const float* __restrict from = rows + r * width;
      float* __restrict to = rows + (r - half) * width;
#pragma omp simd
      for (int64_t k = first; k < last; ++k) to[k] += from[k];
    }
    count = half;
  }
  std::copy(rows + first, rows + last, out + first);
}

}  // namespace

void add_norm(const AddNorm& a) {
  const auto [batch, length, width] = a.shape;
  const bool wide_x = a.x.dtype == Dtype::f32, wide_branch = a.branch.dtype == Dtype::f32;
  const auto add = !a.branch.data ? (wide_x ? read_row<float> : read_row<bf16>)
                   : wide_branch  ? (wide_x ? add_row<float, float> : add_row<bf16, float>)
                                  : (wide_x ? add_row<float, bf16> : add_row<bf16, bf16>);
  const auto normalise = a.normed_dtype == NormOut::f32    ? normalise_row<float>
                         : a.normed_dtype == NormOut::bf16 ? normalise_row<bf16>
                                                           : normalise_row<fp8>;
  const int64_t sum_size = size_of(a.x.dtype) * width;
  const int64_t normed_size = (a.normed_dtype == NormOut::f32 ? 4 : a.normed_dtype == NormOut::bf16 ? 2 : 1) * width;
  const std::vector<float> ones(a.weight ? 0 : width, 1.0f), zeros(a.bias ? 0 : width, 0.0f);
  const float *weight = a.weight ? a.weight : ones.data(), *bias = a.bias ? a.bias : zeros.data();
  const int64_t rows = batch * length;
  const Rows x{a.x, length, rows}, branch{a.branch, length, rows};
#pragma omp parallel
  {
    std::vector<float> buffer(wide_x ? 0 : width);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      char* sum = a.sum ? static_cast<char*>(a.sum) + i * sum_size : nullptr;
      const auto [row, total] = add(x.at(i), branch.at(i), a.factor ? a.factor[i / length] : 1.0f, sum, buffer.data(), width,
                                    x.at(i + kAhead), branch.at(i + kAhead));
      const float mean = total / width;
      Wide squares = {};
      each_vector(width, [&, row = row, width = width](int64_t k, auto count) {
        if (sum) ask_to_write(sum + kAhead * sum_size + k * (sum_size / width));
        const Wide centred = inside(load_part(row + k, count) - mean, count);
        squares += centred * centred;
      });
      const float rstd = 1 / std::sqrt(total_of(squares) / width + a.eps);
      a.mean[i] = mean;
      a.rstd[i] = rstd;
      normalise(row, mean, rstd, weight, bias, a.inverse, static_cast<char*>(a.normed) + i * normed_size, width);
    }
  }
}

void add_norm_backward(const AddNormBackward& a) {
  const auto [batch, length, width] = a.shape;
  const bool wide_x = a.sum.dtype == Dtype::f32, wide_out = a.grad_normed.dtype == Dtype::f32;
  const bool wide_branch = a.dbranch_dtype == Dtype::f32;
  const auto read = wide_out ? (wide_x ? read_gradient<float, float> : read_gradient<float, bf16>)
                             : (wide_x ? read_gradient<bf16, float> : read_gradient<bf16, bf16>);
  const auto write = (wide_out ? (wide_x ? write_for<float, float> : write_for<float, bf16>)
                               : (wide_x ? write_for<bf16, float> : write_for<bf16, bf16>))(wide_branch);
  const int64_t size = size_of(a.sum.dtype) * width, branch_size = size_of(a.dbranch_dtype) * width;
  const int64_t rows = batch * length, chunks = (rows + a.chunk - 1) / a.chunk;
  if (rows == 0 && a.affine) std::fill_n(a.affine, 2 * width, 0.0f);
  if (rows == 0) return;
  const std::vector<float> ones(a.weight ? 0 : width, 1.0f);
  const float* weight = a.weight ? a.weight : ones.data();
  float* partial = a.affine ? static_cast<float*>(workspace<Partial>(chunks * 2 * width * sizeof(float))) : nullptr;
  const Rows grad_sum{a.grad_sum, length, rows}, grad{a.grad_normed, length, rows}, sum{a.sum, length, rows};
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < chunks; ++task) {
      float* dweight = partial ? partial + task * 2 * width : nullptr;
      if (partial) std::fill_n(dweight, 2 * width, 0.0f);
      for (int64_t i = task * a.chunk; i < std::min(rows, (task + 1) * a.chunk); ++i) {
        const Next next{grad.at(i + kAhead), sum.at(i + kAhead), grad_sum.at(i + kAhead)};
        const float mean = a.mean[i], rstd = a.rstd[i];
        const Means means =
            read(grad.at(i), sum.at(i), mean, rstd, weight, dweight, partial ? dweight + width : nullptr, width, next);
        write(grad.at(i), sum.at(i), grad_sum.at(i), mean, rstd, weight, means, a.factor ? a.factor[i / length] : 1.0f,
              static_cast<char*>(a.dx) + i * size,
              a.dbranch ? static_cast<char*>(a.dbranch) + i * branch_size : nullptr, width);
      }
    }
    if (partial)
#pragma omp for schedule(static)
      for (int64_t first = 0; first < 2 * width; first += kColumns)
        sum_columns(partial, chunks, 2 * width, first, std::min(2 * width, first + kColumns), a.affine);
  }
}

}  // namespace COHOBATE_ISA
}  // namespace cohobate
