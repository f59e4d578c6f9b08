#include "attention.h"

#include "tensor.h"

namespace cohobate {

static Heads heads_of(const Tensor& x) { return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)}; }

static AttentionShape shape_of(const Tensor& q, const Tensor& k, double scale) {
  return {q.size(0), q.size(2), q.size(1), k.size(1), q.size(3), static_cast<float>(scale), dtype_of(q)};
}

static void attention_binding(const Tensor& q, const Tensor& k, const Tensor& v, double scale, Tensor out) {
  COHOBATE_DISPATCH(attention)(shape_of(q, k, scale), heads_of(q), heads_of(k), heads_of(v), heads_of(out));
}

static void attention_backward_binding(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& grad, double scale,
                                       Tensor dq, Tensor dk, Tensor dv) {
  COHOBATE_DISPATCH(attention_backward)
  (shape_of(q, k, scale), heads_of(q), heads_of(k), heads_of(v), heads_of(grad), heads_of(dq), heads_of(dk), heads_of(dv));
}

}  // namespace cohobate

STABLE_TORCH_LIBRARY_FRAGMENT(cohobate_native, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, float scale, Tensor(a!) out) -> ()");
  m.def(
      "attention_backward(Tensor q, Tensor k, Tensor v, Tensor grad, float scale, Tensor(a!) dq, Tensor(b!) dk, "
      "Tensor(c!) dv) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cohobate_native, CPU, m) {
  m.impl("attention", TORCH_BOX(&cohobate::attention_binding));
  m.impl("attention_backward", TORCH_BOX(&cohobate::attention_backward_binding));
}
