// gather_patches, and how every kernel that reads pixels finds the bytes of a patch.
#pragma once

#include <cstdint>

#include "isa.h"
#include "number.h"

namespace cohobate {

// Pixels are uint8 [batch, frames, height, width, channels] whose width and channels are packed; strides are in bytes.
// A patch is pt*ph strips of pw*channels adjacent bytes, in the order (frame, row, column, channel).
struct Patches {
  const uint8_t* pixels;
  int64_t stride_b, stride_t, stride_h;
  int64_t grid_h, grid_w;  // patches a frame is high and wide
  int64_t pt, ph, pw, channels;
  const int32_t* rows;  // null: every patch in raster order
  int64_t rows_stride;
  int64_t batch, count;  // samples, patches read of each
};

// Static, so that each instruction set keeps a copy of its own and the linker never mixes them.
static inline int64_t strip_length(const Patches& p) { return p.pw * p.channels; }
static inline int64_t strip_count(const Patches& p) { return p.pt * p.ph; }

// Index of the patch that output row i (of batch*count) reads.
static inline int64_t patch_of(const Patches& p, int64_t i) {
  const int64_t b = i / p.count, j = i % p.count;
  return p.rows ? p.rows[b * p.rows_stride + j] : j;
}

// First byte of the patch that output row i reads.
static inline const uint8_t* patch_bytes(const Patches& p, int64_t i) {
  const int64_t patch = patch_of(p, i);
  const int64_t x = patch % p.grid_w, y = patch / p.grid_w % p.grid_h, t = patch / (p.grid_w * p.grid_h);
  return p.pixels + i / p.count * p.stride_b + t * p.pt * p.stride_t + y * p.ph * p.stride_h + x * strip_length(p);
}

// Strip s of a patch: s counts rows inside frames.
static inline const uint8_t* strip_bytes(const Patches& p, const uint8_t* patch, int64_t s) {
  return patch + s / p.ph * p.stride_t + s % p.ph * p.stride_h;
}

}  // namespace cohobate

COHOBATE_KERNELS(
    // out[i, k] = byte * scale + offset; scale and offset hold one value for each byte of a strip.
    void gather_patches(const Patches& patches, const float* scale, const float* offset, void* out, Dtype dtype);)
