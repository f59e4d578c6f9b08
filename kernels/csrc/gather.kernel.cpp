#include "gather.h"

namespace cohobate {
namespace COHOBATE_ISA {

// kLength: length of a strip where it is known (16 columns of RGB), which halves the time; 0 where it is not.
template <int64_t kLength, class Out>
static void gather(const Patches& patches, const float* __restrict scale, const float* __restrict offset, Out* __restrict out) {
  const int64_t length = kLength ? kLength : strip_length(patches), strips = strip_count(patches);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < patches.batch * patches.count; ++i) {
    const uint8_t* patch = patch_bytes(patches, i);
    for (int64_t s = 0; s < strips; ++s) {
      const uint8_t* __restrict bytes = strip_bytes(patches, patch, s);
      Out* __restrict to = out + (i * strips + s) * length;
      for (int64_t k = 0; k < length; ++k) store(to + k, static_cast<float>(bytes[k]) * scale[k] + offset[k]);
    }
  }
}

template <class Out>
static void gather_any(const Patches& patches, const float* scale, const float* offset, Out* out) {
  (strip_length(patches) == 48 ? gather<48, Out> : gather<0, Out>)(patches, scale, offset, out);
}

void gather_patches(const Patches& patches, const float* scale, const float* offset, void* out, Dtype dtype) {
  if (dtype == Dtype::f32)
    gather_any(patches, scale, offset, static_cast<float*>(out));
  else
    gather_any(patches, scale, offset, static_cast<bf16*>(out));
}

}  // namespace COHOBATE_ISA
}  // namespace cohobate
