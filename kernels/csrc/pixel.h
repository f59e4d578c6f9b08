// pixel_loss: squared error against normalised pixels, loss and error in one pass over the rows.
#pragma once

#include <cstdint>

#include "gather.h"

namespace cohobate {

enum class PixelTarget {
  values = 0,       // (byte/255 - mean) / std
  per_patch = 1,    // those values, standardised over the whole patch ("mae")
  per_channel = 2,  // byte/255, each channel of a patch standardised ("videomae")
};

constexpr int64_t kPixelChunk = 16;  // rows a partial sum covers

}  // namespace cohobate

COHOBATE_KERNELS(
    // error = prediction - target (null: not wanted), partial[i] = sum of error^2 over rows [16 i, 16 i + 16).
    // mean, std: one double a channel.
    void pixel_loss(const Patches& patches, PixelTarget target, const double* mean, const double* std, double eps,
                    const void* prediction, int64_t prediction_stride_b, int64_t prediction_stride_n, Dtype dtype, void* error,
                    double* partial);
    // out = error * factor
    void pixel_scale(const void* error, Dtype dtype, float factor, int64_t count, void* out);)
