#include "assemble.h"

#include <optional>
#include <vector>

#include "tensor.h"

namespace cohobate {

static Assembly assembly_of(const Tensor& rows, int64_t visible, int64_t prefix, int64_t width, bool raster) {
  return {static_cast<const int32_t*>(rows.const_data_ptr()),
          rows.stride(0),
          rows.size(0),
          visible,
          rows.size(1),
          prefix,
          width,
          raster};
}

static void assemble_binding(const Tensor& x, const Tensor& mask_token, const std::optional<Tensor>& positions,
                             const Tensor& rows, bool raster, int64_t prefix, Tensor out) {
  const float* table = positions ? static_cast<const float*>(positions->const_data_ptr()) : nullptr;
  COHOBATE_DISPATCH(assemble)
  (assembly_of(rows, x.size(1) - prefix, prefix, x.size(2), raster), x.const_data_ptr(), x.stride(0), x.stride(1),
   static_cast<const float*>(mask_token.const_data_ptr()), table, out.mutable_data_ptr(), dtype_of(x));
}

// dmask: fp32 [width], or empty where it is not wanted.
static void assemble_backward_binding(const Tensor& grad, const Tensor& rows, int64_t visible, bool raster, int64_t prefix,
                                      int64_t chunk, Tensor dx, Tensor dmask) {
  const int64_t width = grad.size(2), tasks = grad.size(0) * ((grad.size(1) + chunk - 1) / chunk);
  const bool want_mask = dmask.numel() > 0;
  std::vector<float> partial(want_mask ? std::max<int64_t>(tasks, 1) * width : 0);
  COHOBATE_DISPATCH(assemble_backward)
  (assembly_of(rows, visible, prefix, width, raster), grad.const_data_ptr(), grad.stride(0), grad.stride(1), chunk,
   dx.mutable_data_ptr(), want_mask ? partial.data() : nullptr, dtype_of(grad));
  if (!want_mask) return;
  COHOBATE_DISPATCH(tree_sum)(partial.data(), tasks, width);
  std::copy_n(partial.data(), width, static_cast<float*>(dmask.mutable_data_ptr()));
}

static void sum_rows_binding(const Tensor& source, const std::optional<Tensor>& index, int64_t prefix, Tensor out) {
  COHOBATE_DISPATCH(sum_rows)
  (source.const_data_ptr(), source.stride(0), source.stride(1),
   index ? static_cast<const int32_t*>(index->const_data_ptr()) : nullptr, index ? index->stride(0) : 0, source.size(0),
   out.size(0), prefix, out.size(1), static_cast<float*>(out.mutable_data_ptr()), dtype_of(source));
}

}  // namespace cohobate

STABLE_TORCH_LIBRARY_FRAGMENT(cohobate_native, m) {
  m.def("assemble(Tensor x, Tensor mask_token, Tensor? positions, Tensor rows, bool raster, int prefix, Tensor(a!) out) -> ()");
  m.def(
      "assemble_backward(Tensor grad, Tensor rows, int visible, bool raster, int prefix, int chunk, Tensor(a!) dx, "
      "Tensor(b!) dmask) -> ()");
  m.def("sum_rows(Tensor source, Tensor? index, int prefix, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cohobate_native, CPU, m) {
  m.impl("assemble", TORCH_BOX(&cohobate::assemble_binding));
  m.impl("assemble_backward", TORCH_BOX(&cohobate::assemble_backward_binding));
  m.impl("sum_rows", TORCH_BOX(&cohobate::sum_rows_binding));
}
