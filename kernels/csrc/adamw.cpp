#include "adamw.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "tensor.h"

namespace cohobate {

// Calls add(tensor, begin, size) for every chunk of the tensors.
template <class F>
static void cut(const std::vector<Tensor>& tensors, F add) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t numel = tensors[i].numel();
    for (int64_t begin = 0; begin < numel; begin += kAdamwChunk) add(i, begin, std::min(kAdamwChunk, numel - begin));
  }
}

static float number(const std::optional<Tensor>& tensor, float otherwise = 0) {
  return tensor ? *static_cast<const float*>(tensor->const_data_ptr()) : otherwise;
}

static void adamw_binding(std::vector<Tensor> parameters, std::vector<Tensor> gradients, std::vector<Tensor> exp_avgs,
                          std::vector<Tensor> exp_avg_sqs, Tensor steps, std::vector<Tensor> shadows, const Tensor& rate,
                          const std::optional<Tensor>& scale, const std::optional<Tensor>& skip, std::vector<double> decays,
                          double beta1, double beta2, double eps) {
  const bool skipped = number(skip) != 0;
  float* step = static_cast<float*>(steps.mutable_data_ptr());
  for (size_t i = 0; i < parameters.size() && !skipped; ++i) step[i] += 1;
  std::vector<AdamwChunk> chunks;
  cut(skipped ? shadows : parameters, [&](size_t i, int64_t begin, int64_t size) {
    const Tensor& gradient = gradients[i];
    bf16* shadow = i < shadows.size() ? static_cast<bf16*>(shadows[i].mutable_data_ptr()) + begin : nullptr;
    chunks.push_back({
        static_cast<float*>(parameters[i].mutable_data_ptr()) + begin,
        static_cast<float*>(exp_avgs[i].mutable_data_ptr()) + begin,
        static_cast<float*>(exp_avg_sqs[i].mutable_data_ptr()) + begin,
        static_cast<const char*>(gradient.const_data_ptr()) + begin * gradient.element_size(),
        shadow,
        size,
        static_cast<float>(1 - number(rate) * decays[i]),
        static_cast<float>(number(rate) / (1 - std::pow(beta1, step[i]))),
        static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step[i]))),
    });
  });
  const int64_t count = static_cast<int64_t>(chunks.size());
  if (!count) return;
  if (skipped) return COHOBATE_DISPATCH(adamw_shadows)(chunks.data(), count);
  const AdamwNumbers numbers{1 / number(scale, 1), static_cast<float>(1 - beta1), static_cast<float>(beta2),
                             static_cast<float>(1 - beta2), static_cast<float>(eps)};
  COHOBATE_DISPATCH(adamw)(chunks.data(), count, dtype_of(gradients[0]), numbers);
}

// Chunks are added in their order, in double precision.
static double squares_binding(std::vector<Tensor> tensors) {
  std::vector<SquaresChunk> chunks;
  cut(tensors, [&](size_t i, int64_t begin, int64_t size) {
    const char* values = static_cast<const char*>(tensors[i].const_data_ptr()) + begin * tensors[i].element_size();
    chunks.push_back({values, size, dtype_of(tensors[i])});
  });
  std::vector<float> sums(chunks.size());
  COHOBATE_DISPATCH(squares)(chunks.data(), static_cast<int64_t>(chunks.size()), sums.data());
  double total = 0;
  for (const float sum : sums) total += sum;
  return total;
}

}  // namespace cohobate

STABLE_TORCH_LIBRARY_FRAGMENT(cohobate_native, m) {
  m.def(
      "adamw(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!) steps, Tensor(e!)[] shadows, Tensor rate, Tensor? scale, Tensor? skip, float[] decays, float beta1, "
      "float beta2, float eps) -> ()");
  m.def("squares(Tensor[] tensors) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(cohobate_native, CPU, m) {
  m.impl("adamw", TORCH_BOX(&cohobate::adamw_binding));
  m.impl("squares", TORCH_BOX(&cohobate::squares_binding));
}
