#include "attention.h"

#include <optional>

#include "tensor.h"

namespace cohobate {

struct Packed {
  Heads q, k, v;
};

// Part number `part` of rows that pack several of `width` values.
static Heads part_of(const Tensor& rows, int64_t part, int64_t width, int64_t heads) {
  const int64_t bytes = dtype_of(rows) == Dtype::f32 ? 4 : 2;
  char* data = static_cast<char*>(const_cast<void*>(rows.const_data_ptr()));
  return {data + part * width * bytes, rows.stride(0), rows.stride(1), width / heads};
}

// Rows q, k, v in one tensor, or q in `queries` and k, v in the other.
static Packed unpack(const Tensor& packed, const std::optional<Tensor>& queries, int64_t heads) {
  const int64_t first = queries ? 0 : 1, width = packed.size(2) / (first + 2);
  return {part_of(queries ? *queries : packed, 0, width, heads), part_of(packed, first, width, heads),
          part_of(packed, first + 1, width, heads)};
}

// `rows`: a tensor with a row of the width of out for each query.
static AttentionShape shape_of(const Tensor& packed, const Tensor& rows, int64_t heads, double scale) {
  return {rows.size(0), heads, rows.size(1), packed.size(1), rows.size(2) / heads, static_cast<float>(scale), dtype_of(rows)};
}

static void attention_binding(const Tensor& packed, const std::optional<Tensor>& queries, int64_t heads, double scale,
                              Tensor out) {
  const Packed x = unpack(packed, queries, heads);
  COHOBATE_DISPATCH(attention)(shape_of(packed, out, heads, scale), x.q, x.k, x.v, part_of(out, 0, out.size(2), heads));
}

static void attention_backward_binding(const Tensor& grad, const Tensor& packed, const std::optional<Tensor>& queries,
                                       int64_t heads, double scale, Tensor dpacked, const std::optional<Tensor>& dqueries) {
  const Packed x = unpack(packed, queries, heads), dx = unpack(dpacked, dqueries, heads);
  COHOBATE_DISPATCH(attention_backward)
  (shape_of(packed, grad, heads, scale), x.q, x.k, x.v, part_of(grad, 0, grad.size(2), heads), dx.q, dx.k, dx.v);
}

}  // namespace cohobate

STABLE_TORCH_LIBRARY_FRAGMENT(cohobate_native, m) {
  m.def("attention(Tensor packed, Tensor? queries, int heads, float scale, Tensor(a!) out) -> ()");
  m.def(
      "attention_backward(Tensor grad, Tensor packed, Tensor? queries, int heads, float scale, Tensor(a!) dpacked, "
      "Tensor(b!)? dqueries) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cohobate_native, CPU, m) {
  m.impl("attention", TORCH_BOX(&cohobate::attention_binding));
  m.impl("attention_backward", TORCH_BOX(&cohobate::attention_backward_binding));
}
