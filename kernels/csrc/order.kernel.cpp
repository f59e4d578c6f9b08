#include "order.h"

#include <omp.h>

namespace cohobate {
namespace COHOBATE_ISA {
namespace {

constexpr int kLanes = 16;  // counters that go through the rounds together

// Words 4*first .. 4*(first+kLanes)-1 of a sample.
void philox(uint32_t first, uint64_t id, uint32_t stream, uint64_t seed, uint32_t* words) {
  uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    c0[i] = first + static_cast<uint32_t>(i);
    c1[i] = static_cast<uint32_t>(id);
    c2[i] = static_cast<uint32_t>(id >> 32);
    c3[i] = stream;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t a = uint64_t{0xD2511F53u} * c0[i], b = uint64_t{0xCD9E8D57u} * c2[i];
      c0[i] = static_cast<uint32_t>(b >> 32) ^ c1[i] ^ k0;
      c2[i] = static_cast<uint32_t>(a >> 32) ^ c3[i] ^ k1;
      c1[i] = static_cast<uint32_t>(b);
      c3[i] = static_cast<uint32_t>(a);
    }
  for (int i = 0; i < kLanes; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
}

// Least significant digit first, so equal keys stay in the order of their index. An item is key << 32 | index.
void sort_by_key(uint64_t* items, uint64_t* spare, int64_t length) {
  uint32_t starts[4][256] = {};
  for (int64_t i = 0; i < length; ++i)
    for (int digit = 0; digit < 4; ++digit) ++starts[digit][items[i] >> (32 + 8 * digit) & 255];
  for (int digit = 0; digit < 4; ++digit) {
    uint32_t before = 0;
    for (uint32_t& start : starts[digit]) {
      const uint32_t count = start;
      start = before;
      before += count;
    }
    for (int64_t i = 0; i < length; ++i) spare[starts[digit][items[i] >> (32 + 8 * digit) & 255]++] = items[i];
    uint64_t* const sorted = spare;
    spare = items;
    items = sorted;
  }
}

}  // namespace

void random_order(const int64_t* sample_ids, int64_t ids_stride, int64_t batch, int64_t length, uint64_t seed, uint32_t stream,
                  uint64_t* scratch, int32_t* out) {
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < batch; ++b) {
    uint64_t* items = scratch + 2 * length * omp_get_thread_num();
    const uint64_t id = static_cast<uint64_t>(sample_ids[b * ids_stride]);
    for (int64_t first = 0; first < length; first += 4 * kLanes) {
      uint32_t words[4 * kLanes];
      philox(static_cast<uint32_t>(first / 4), id, stream, seed, words);
      const int64_t size = length - first < 4 * kLanes ? length - first : 4 * kLanes;
      for (int64_t i = 0; i < size; ++i) items[first + i] = uint64_t{words[i]} << 32 | static_cast<uint64_t>(first + i);
    }
    sort_by_key(items, items + length, length);
    for (int64_t i = 0; i < length; ++i) out[b * length + i] = static_cast<int32_t>(static_cast<uint32_t>(items[i]));
  }
}

}  // namespace COHOBATE_ISA
}  // namespace cohobate
