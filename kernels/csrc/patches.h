// From the tensors of a binding to the Patches of a kernel.
#pragma once

#include <optional>

#include "gather.h"
#include "tensor.h"

namespace cohobate {

inline Patches patches_of(const Tensor& pixels, const std::optional<Tensor>& rows, int64_t pt, int64_t ph, int64_t pw) {
  Patches p;
  p.pixels = static_cast<const uint8_t*>(pixels.const_data_ptr());
  p.stride_b = pixels.stride(0);
  p.stride_t = pixels.stride(1);
  p.stride_h = pixels.stride(2);
  p.grid_h = pixels.size(2) / ph;
  p.grid_w = pixels.size(3) / pw;
  p.pt = pt;
  p.ph = ph;
  p.pw = pw;
  p.channels = pixels.size(4);
  p.rows = rows ? static_cast<const int32_t*>(rows->const_data_ptr()) : nullptr;
  p.rows_stride = rows ? rows->stride(0) : 0;
  p.batch = pixels.size(0);
  p.count = rows ? rows->size(1) : pixels.size(1) / pt * p.grid_h * p.grid_w;
  return p;
}

}  // namespace cohobate
