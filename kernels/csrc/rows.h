// take and put move whole rows, so they see bytes, not numbers. Strides and widths are in bytes.
#pragma once

#include <cstdint>

#include "isa.h"

COHOBATE_KERNELS(
    void take(const char* x, int64_t x_batch_stride, int64_t x_row_stride, const int32_t* rows, int64_t rows_stride, char* out,
              int64_t batch, int64_t count, int64_t width);
    void put(const char* x, int64_t x_batch_stride, int64_t x_row_stride, const int32_t* rows, int64_t rows_stride, char* out,
             int64_t batch, int64_t count, int64_t length, int64_t width);)
