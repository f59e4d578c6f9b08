// random_order: Philox4x32-10 (Salmon et al., SC 2011) words, sorted. The counter layout is that of kernels/tokens/order.py.
#pragma once

#include <cstdint>

#include "isa.h"

COHOBATE_KERNELS(
    // scratch: 2 * length words of 64 bits for each OpenMP thread.
    void random_order(const int64_t* sample_ids, int64_t ids_stride, int64_t batch, int64_t length, uint64_t seed,
                      uint32_t stream, uint64_t* scratch, int32_t* out);)
