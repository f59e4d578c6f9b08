#include "order.h"

#include <omp.h>

#include <vector>

#include "tensor.h"

namespace cohobate {

static void random_order_binding(const Tensor& sample_ids, int64_t seed, int64_t stream, Tensor out) {
  const int64_t length = out.size(1);
  std::vector<uint64_t> scratch(2 * length * omp_get_max_threads());
  COHOBATE_DISPATCH(random_order)
  (static_cast<const int64_t*>(sample_ids.const_data_ptr()), sample_ids.stride(0), sample_ids.size(0), length,
   static_cast<uint64_t>(seed), static_cast<uint32_t>(stream), scratch.data(), static_cast<int32_t*>(out.mutable_data_ptr()));
}

}  // namespace cohobate

STABLE_TORCH_LIBRARY_FRAGMENT(cohobate_native, m) {
  m.def("random_order(Tensor sample_ids, int seed, int stream, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cohobate_native, CPU, m) {
  m.impl("random_order", TORCH_BOX(&cohobate::random_order_binding));
}
