#include "embed.h"

#include <optional>

#include "tensor.h"

namespace cohobate {

static const int32_t* rows_of(const std::optional<Tensor>& rows) {
  return rows ? static_cast<const int32_t*>(rows->const_data_ptr()) : nullptr;
}

static const float* floats_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

static float* mutable_floats_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<float*>(tensor->mutable_data_ptr()) : nullptr;
}

// bias, positions: fp32, contiguous.
static void epilogue_binding(Tensor out, const std::optional<Tensor>& rows, const std::optional<Tensor>& bias,
                             const std::optional<Tensor>& positions) {
  COHOBATE_DISPATCH(embed_epilogue)
  (out.mutable_data_ptr(), dtype_of(out), out.size(0), out.size(1), out.size(2), rows_of(rows), rows ? rows->stride(0) : 0,
   floats_of(bias), floats_of(positions));
}

static void sums_binding(const Tensor& grad, const std::optional<Tensor>& rows, int64_t length,
                         const std::optional<Tensor>& bias_grad, const std::optional<Tensor>& positions_grad) {
  COHOBATE_DISPATCH(embed_sums)
  (grad.const_data_ptr(), dtype_of(grad), grad.stride(0), grad.stride(1), grad.size(0), grad.size(1), grad.size(2),
   rows_of(rows), rows ? rows->stride(0) : 0, length, mutable_floats_of(bias_grad), mutable_floats_of(positions_grad));
}

}  // namespace cohobate

STABLE_TORCH_LIBRARY_FRAGMENT(cohobate_native, m) {
  m.def("embed_epilogue(Tensor(a!) out, Tensor? rows, Tensor? bias, Tensor? positions) -> ()");
  m.def("embed_sums(Tensor grad, Tensor? rows, int length, Tensor(a!)? bias_grad, Tensor(b!)? positions_grad) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cohobate_native, CPU, m) {
  m.impl("embed_epilogue", TORCH_BOX(&cohobate::epilogue_binding));
  m.impl("embed_sums", TORCH_BOX(&cohobate::sums_binding));
}
