#include "gather.h"

#include <vector>

#include "patches.h"

namespace cohobate {

// affine: fp32 [2, channels], scale over offset.
static void gather_patches_binding(const Tensor& pixels, const std::optional<Tensor>& rows, int64_t pt, int64_t ph, int64_t pw,
                                   const Tensor& affine, Tensor out) {
  const Patches patches = patches_of(pixels, rows, pt, ph, pw);
  const float* table = static_cast<const float*>(affine.const_data_ptr());
  const int64_t length = strip_length(patches);
  std::vector<float> scale(length), offset(length);
  for (int64_t k = 0; k < length; ++k) {
    scale[k] = table[k % patches.channels];
    offset[k] = table[patches.channels + k % patches.channels];
  }
  COHOBATE_DISPATCH(gather_patches)(patches, scale.data(), offset.data(), out.mutable_data_ptr(), dtype_of(out));
}

// The first sample whose rows hold a value outside [0, length), or -1: a kernel would read out of bounds.
static int64_t row_outside(const Tensor& rows, int64_t length) {
  const int32_t* values = static_cast<const int32_t*>(rows.const_data_ptr());
  for (int64_t b = 0; b < rows.size(0); ++b) {
    const int32_t* row = values + b * rows.stride(0);
    bool outside = false;
    for (int64_t j = 0; j < rows.size(1); ++j) outside |= static_cast<uint64_t>(static_cast<int64_t>(row[j])) >= static_cast<uint64_t>(length);
    if (outside) return b;
  }
  return -1;
}

}  // namespace cohobate

STABLE_TORCH_LIBRARY_FRAGMENT(cohobate_native, m) {
  m.def("gather_patches(Tensor pixels, Tensor? rows, int pt, int ph, int pw, Tensor affine, Tensor(a!) out) -> ()");
  m.def("row_outside(Tensor rows, int length) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(cohobate_native, CPU, m) {
  m.impl("gather_patches", TORCH_BOX(&cohobate::gather_patches_binding));
  m.impl("row_outside", TORCH_BOX(&cohobate::row_outside));
}
