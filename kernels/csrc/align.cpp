#include "align.h"

#include <optional>
#include <string>
#include <vector>

#include "tensor.h"

namespace cohobate {

static AlignRows rows_of(const Tensor& tensor, const std::optional<Tensor>& rows) {
  AlignRows view{tensor.const_data_ptr(), dtype_of(tensor), tensor.stride(0), tensor.stride(1), tensor.size(1), nullptr, 0};
  if (rows) {
    static const int32_t none = 0;  // an empty list has no address, and a null one would mean all rows
    view.rows = rows->numel() ? static_cast<const int32_t*>(rows->const_data_ptr()) : &none;
    view.rows_stride = rows->stride(0);
  }
  return view;
}

// Which rows of the tensor are chosen. A row outside it would be read, or written, somewhere else, and one chosen twice
// would have one of its two gradients: say so instead. The indices are already in memory.
static std::vector<uint8_t> chosen_rows(const char* argument, const AlignRows& view, int64_t batch, int64_t count,
                                        bool distinct) {
  std::vector<uint8_t> chosen(view.rows ? batch * view.length : 0);
  if (!view.rows) return chosen;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t j = 0; j < count; ++j) {
      const int64_t row = view.row(b, j);
      STD_TORCH_CHECK(row >= 0 && row < view.length, argument, ": expected rows in [0, ", view.length, "), got ", row,
                      " in sample ", b);
      uint8_t& seen = chosen[b * view.length + row];
      STD_TORCH_CHECK(!distinct || !seen, argument, ": expected distinct rows in a sample, got row ", row, " twice in sample ",
                      b);
      seen = 1;
    }
  return chosen;
}

// Returns the sum of the layer's row losses. grad, when given, is written whole and already scaled.
static double align_binding(const Tensor& prediction, const Tensor& target, const std::optional<Tensor>& prediction_rows,
                            const std::optional<Tensor>& target_rows, int64_t kind, double beta, bool standardise, int64_t ddof,
                            double eps, bool eps_inside, double scale, const std::optional<Tensor>& grad) {
  const AlignLayer layer{
      rows_of(prediction, prediction_rows),
      rows_of(target, target_rows),
      prediction.size(0),
      prediction_rows ? prediction_rows->size(1) : prediction.size(1),
      prediction.size(2),
      static_cast<AlignKind>(kind),
      static_cast<float>(beta),
      standardise,
      eps_inside,
      static_cast<float>(ddof),
      static_cast<float>(eps),
      static_cast<float>(scale),
      grad ? grad->mutable_data_ptr() : nullptr,
  };
  const auto is_read = chosen_rows("prediction_rows", layer.prediction, layer.batch, layer.count, grad.has_value());
  chosen_rows("target_rows", layer.target, layer.batch, layer.count, false);
  std::vector<float> row_losses(layer.batch * layer.count);
  COHOBATE_DISPATCH(align)(layer, is_read.data(), row_losses.data());
  double sum = 0;
  for (const float loss : row_losses) sum += loss;
  return sum;
}

}  // namespace cohobate

STABLE_TORCH_LIBRARY_FRAGMENT(cohobate_native, m) {
  m.def(
      "align(Tensor prediction, Tensor target, Tensor? prediction_rows, Tensor? target_rows, int kind, float beta, "
      "bool standardise, int ddof, float eps, bool eps_inside, float scale, Tensor(a!)? grad) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(cohobate_native, CPU, m) { m.impl("align", TORCH_BOX(&cohobate::align_binding)); }
