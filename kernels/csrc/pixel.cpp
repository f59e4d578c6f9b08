#include "pixel.h"

#include <vector>

#include "patches.h"

namespace cohobate {

// moments: fp64 [2, channels], mean over std. loss: fp32, 0-d. error: as prediction and contiguous, or absent.
static void pixel_loss_binding(const Tensor& prediction, const Tensor& pixels, const std::optional<Tensor>& rows, int64_t pt,
                               int64_t ph, int64_t pw, const Tensor& moments, int64_t target, double eps, Tensor loss,
                               const std::optional<Tensor>& error) {
  const Patches patches = patches_of(pixels, rows, pt, ph, pw);
  const double* mean = static_cast<const double*>(moments.const_data_ptr());
  const int64_t count = patches.batch * patches.count;
  std::vector<double> partial((count + kPixelChunk - 1) / kPixelChunk);
  COHOBATE_DISPATCH(pixel_loss)
  (patches, static_cast<PixelTarget>(target), mean, mean + patches.channels, eps, prediction.const_data_ptr(),
   prediction.stride(0), prediction.stride(1), dtype_of(prediction), error ? error->mutable_data_ptr() : nullptr,
   partial.data());
  double sum = 0;
  for (const double part : partial) sum += part;
  *static_cast<float*>(loss.mutable_data_ptr()) =
      static_cast<float>(sum / static_cast<double>(count * strip_count(patches) * strip_length(patches)));
}

// out = error * (grad * factor), grad being 0-d fp32.
static void pixel_scale_binding(const Tensor& error, const Tensor& grad, double factor, Tensor out) {
  const float scale = static_cast<float>(*static_cast<const float*>(grad.const_data_ptr()) * factor);
  COHOBATE_DISPATCH(pixel_scale)(error.const_data_ptr(), dtype_of(error), scale, error.numel(), out.mutable_data_ptr());
}

}  // namespace cohobate

STABLE_TORCH_LIBRARY_FRAGMENT(cohobate_native, m) {
  m.def(
      "pixel_loss(Tensor prediction, Tensor pixels, Tensor? rows, int pt, int ph, int pw, Tensor moments, int target, "
      "float eps, Tensor(a!) loss, Tensor(b!)? error) -> ()");
  m.def("pixel_scale(Tensor error, Tensor grad, float factor, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cohobate_native, CPU, m) {
  m.impl("pixel_loss", TORCH_BOX(&cohobate::pixel_loss_binding));
  m.impl("pixel_scale", TORCH_BOX(&cohobate::pixel_scale_binding));
}
