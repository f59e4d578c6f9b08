// Memory fetched before its turn: where a pass reads what lies outside the caches, waiting for it costs more than the pass.
#pragma once

#include <algorithm>
#include <cstdint>

namespace cohobate {
namespace COHOBATE_ISA {

// Fetches [begin, end) in order, a share of it at each of `calls` calls: what a pass reads next, while it works on the present.
class Ahead {
 public:
  template <class T>
  Ahead(const T* begin, const T* end, int64_t calls)
      : at_(reinterpret_cast<const char*>(begin)), end_(std::max(at_, reinterpret_cast<const char*>(end))),
        share_(((end_ - at_) / kLine + calls) / calls * kLine) {}

  void fetch() {
    for (const char* stop = at_ + std::min<int64_t>(share_, end_ - at_); at_ < stop; at_ += kLine) __builtin_prefetch(at_);
  }

 private:
  static constexpr int64_t kLine = 64;
  const char *at_, *end_;
  int64_t share_;
};

// A line that is written soon: it may lie in another core's cache.
static inline void fetch_to_write(const void* line) { __builtin_prefetch(line, 1); }

}  // namespace COHOBATE_ISA
}  // namespace cohobate
