#include "activation.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "assemble.h"
#include "tensor.h"

namespace cohobate {

// zeros: what stands for a bias that is not there.
static BiasGelu bias_gelu_of(const Tensor& x, const std::optional<Tensor>& bias, bool tanh, std::vector<float>& zeros) {
  if (!bias) zeros.resize(x.size(1));
  const float* values = bias ? static_cast<const float*>(bias->const_data_ptr()) : zeros.data();
  return {x.const_data_ptr(), dtype_of(x), x.stride(0), x.size(0), x.size(1), values, tanh};
}

// out: in x's dtype, or uint8 for float8.
static void bias_gelu_binding(const Tensor& x, const std::optional<Tensor>& bias, bool tanh, double inverse, Tensor out) {
  std::vector<float> zeros;
  COHOBATE_DISPATCH(bias_gelu)
  (bias_gelu_of(x, bias, tanh, zeros), out.mutable_data_ptr(), out.scalar_type() == ScalarType::Byte,
   static_cast<float>(inverse));
}

static void bias_gelu_backward_binding(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& bias, bool tanh,
                                       int64_t chunk, Tensor dx, const std::optional<Tensor>& dbias) {
  std::vector<float> zeros;
  const BiasGelu a = bias_gelu_of(x, bias, tanh, zeros);
  const int64_t chunks = (a.rows + chunk - 1) / chunk;
  std::vector<float> partial(dbias ? std::max<int64_t>(chunks, 1) * a.width : 0);
  COHOBATE_DISPATCH(bias_gelu_backward)
  (a, grad.const_data_ptr(), grad.stride(0), dx.mutable_data_ptr(), chunk, dbias ? partial.data() : nullptr);
  if (!dbias) return;
  COHOBATE_DISPATCH(tree_sum)(partial.data(), chunks, a.width);
  std::copy_n(partial.data(), a.width, static_cast<float*>(dbias->mutable_data_ptr()));
}

}  // namespace cohobate

STABLE_TORCH_LIBRARY_FRAGMENT(cohobate_native, m) {
  m.def("bias_gelu(Tensor x, Tensor? bias, bool tanh, float inverse, Tensor(a!) out) -> ()");
  m.def(
      "bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias, bool tanh, int chunk, Tensor(a!) dx, Tensor(b!)? dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cohobate_native, CPU, m) {
  m.impl("bias_gelu", TORCH_BOX(&cohobate::bias_gelu_binding));
  m.impl("bias_gelu_backward", TORCH_BOX(&cohobate::bias_gelu_backward_binding));
}
