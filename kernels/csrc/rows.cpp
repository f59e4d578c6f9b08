#include "rows.h"

#include "tensor.h"

namespace cohobate {

static void take_binding(const Tensor& x, const Tensor& rows, Tensor out) {
  const int64_t size = x.element_size();
  COHOBATE_DISPATCH(take)
  (static_cast<const char*>(x.const_data_ptr()), x.stride(0) * size, x.stride(1) * size,
   static_cast<const int32_t*>(rows.const_data_ptr()), rows.stride(0), static_cast<char*>(out.mutable_data_ptr()), rows.size(0),
   rows.size(1), x.size(2) * size);
}

static void put_binding(const Tensor& x, const Tensor& rows, Tensor out) {
  const int64_t size = x.element_size();
  COHOBATE_DISPATCH(put)
  (static_cast<const char*>(x.const_data_ptr()), x.stride(0) * size, x.stride(1) * size,
   static_cast<const int32_t*>(rows.const_data_ptr()), rows.stride(0), static_cast<char*>(out.mutable_data_ptr()), rows.size(0),
   rows.size(1), out.size(1), x.size(2) * size);
}

}  // namespace cohobate

STABLE_TORCH_LIBRARY_FRAGMENT(cohobate_native, m) {
  m.def("take(Tensor x, Tensor rows, Tensor(a!) out) -> ()");
  m.def("put(Tensor x, Tensor rows, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cohobate_native, CPU, m) {
  m.impl("take", TORCH_BOX(&cohobate::take_binding));
  m.impl("put", TORCH_BOX(&cohobate::put_binding));
}
