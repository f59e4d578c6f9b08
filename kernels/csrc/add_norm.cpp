#include "add_norm.h"

#include <optional>

#include "tensor.h"

namespace cohobate {

static NormRows norm_rows(const Tensor& tensor) {
  return {tensor.const_data_ptr(), dtype_of(tensor), tensor.stride(0), tensor.stride(1)};
}

static NormRows norm_rows(const std::optional<Tensor>& tensor) {
  return tensor ? norm_rows(*tensor) : NormRows{nullptr, Dtype::f32, 0, 0};
}

static const float* floats(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

static NormShape norm_shape(const Tensor& x) { return {x.size(0), x.size(1), x.size(2)}; }

// sum comes with a branch alone; normed: fp32, bf16, or uint8 for float8; stats: fp32 [2, rows], means and reciprocal deviations.
static void add_norm_binding(const Tensor& x, const std::optional<Tensor>& branch, const std::optional<Tensor>& weight,
                             const std::optional<Tensor>& bias, const std::optional<Tensor>& factor, double eps,
                             double inverse, const std::optional<Tensor>& sum, Tensor normed, Tensor stats) {
  const bool is_fp8 = normed.scalar_type() == ScalarType::Byte;
  float* mean = static_cast<float*>(stats.mutable_data_ptr());
  COHOBATE_DISPATCH(add_norm)
  ({norm_shape(x), norm_rows(x), norm_rows(branch), floats(factor), floats(weight), floats(bias), static_cast<float>(eps),
    static_cast<float>(inverse), sum ? sum->mutable_data_ptr() : nullptr, normed.mutable_data_ptr(),
    is_fp8                           ? NormOut::fp8
    : dtype_of(normed) == Dtype::f32 ? NormOut::f32
                                     : NormOut::bf16,
    mean, mean + x.size(0) * x.size(1)});
}

// affine: fp32 [2, width], the gradients of weight and bias, when they are wanted.
static void add_norm_backward_binding(const std::optional<Tensor>& grad_sum, const Tensor& grad_normed, const Tensor& sum,
                                      const Tensor& stats, const std::optional<Tensor>& weight,
                                      const std::optional<Tensor>& factor, int64_t chunk, Tensor dx,
                                      const std::optional<Tensor>& dbranch, const std::optional<Tensor>& affine) {
  const NormShape shape = norm_shape(sum);
  const float* mean = static_cast<const float*>(stats.const_data_ptr());
  COHOBATE_DISPATCH(add_norm_backward)
  ({shape, norm_rows(grad_sum), norm_rows(grad_normed), norm_rows(sum), mean, mean + shape.batch * shape.length,
    floats(factor), floats(weight), dx.mutable_data_ptr(), dbranch ? dbranch->mutable_data_ptr() : nullptr,
    dbranch ? dtype_of(*dbranch) : Dtype::f32, chunk, affine ? static_cast<float*>(affine->mutable_data_ptr()) : nullptr});
}

}  // namespace cohobate

STABLE_TORCH_LIBRARY_FRAGMENT(cohobate_native, m) {
  m.def(
      "add_norm(Tensor x, Tensor? branch, Tensor? weight, Tensor? bias, Tensor? factor, float eps, float inverse, "
      "Tensor(a!)? sum, Tensor(b!) normed, Tensor(c!) stats) -> ()");
  m.def(
      "add_norm_backward(Tensor? grad_sum, Tensor grad_normed, Tensor sum, Tensor stats, Tensor? weight, Tensor? factor, "
      "int chunk, Tensor(a!) dx, Tensor(b!)? dbranch, Tensor(c!)? affine) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cohobate_native, CPU, m) {
  m.impl("add_norm", TORCH_BOX(&cohobate::add_norm_binding));
  m.impl("add_norm_backward", TORCH_BOX(&cohobate::add_norm_backward_binding));
}
