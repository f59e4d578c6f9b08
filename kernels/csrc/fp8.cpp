#include "fp8.h"

#include "tensor.h"

namespace cohobate {

// Float8 tensors come as uint8; both are [rows, width].
static void quantise_binding(const Tensor& x, double inverse, Tensor out) {
  COHOBATE_DISPATCH(quantise)
  (x.const_data_ptr(), dtype_of(x), x.stride(0), x.size(0), x.size(1), static_cast<float>(inverse),
   static_cast<fp8*>(out.mutable_data_ptr()));
}

static void dequantise_binding(const Tensor& x, double scale, Tensor out) {
  COHOBATE_DISPATCH(dequantise)
  (static_cast<const fp8*>(x.const_data_ptr()), x.stride(0), x.size(0), x.size(1), static_cast<float>(scale),
   out.mutable_data_ptr(), dtype_of(out));
}

}  // namespace cohobate

STABLE_TORCH_LIBRARY_FRAGMENT(cohobate_native, m) {
  m.def("quantise_fp8(Tensor x, float inverse, Tensor(a!) out) -> ()");
  m.def("dequantise_fp8(Tensor x, float scale, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cohobate_native, CPU, m) {
  m.impl("quantise_fp8", TORCH_BOX(&cohobate::quantise_binding));
  m.impl("dequantise_fp8", TORCH_BOX(&cohobate::dequantise_binding));
}
