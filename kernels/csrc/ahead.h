// Memory asked for before its turn: where a pass reads what lies outside the caches, waiting costs more than the pass itself.
// Included by *.kernel.cpp files alone, inside their namespace.
#pragma once

#include <algorithm>
#include <cstdint>

namespace cohobate {
namespace COHOBATE_ISA {

// Ask for a line before it is needed; an address past the end does no harm. Lines of results are asked for too: their memory
// was used before, so they lie in another core's cache, and stores wait for them.
static inline void ask(const void* p) { __builtin_prefetch(p, 0, 3); }
static inline void ask_to_write(const void* p) { __builtin_prefetch(p, 1, 3); }

// Asks for [begin, end) in order, a share of it at each of `calls` calls: what a pass reads next, while it works on the present.
class Ahead {
 public:
  template <class T>
  Ahead(const T* begin, const T* end, int64_t calls)
      : at_(reinterpret_cast<const char*>(begin)), end_(std::max(at_, reinterpret_cast<const char*>(end))),
        share_(((end_ - at_) / kLine + calls) / calls * kLine) {}

  void ask_on() {
    for (const char* stop = at_ + std::min<int64_t>(share_, end_ - at_); at_ < stop; at_ += kLine) ask(at_);
  }

 private:
  static constexpr int64_t kLine = 64;
  const char *at_, *end_;
  int64_t share_;
};

}  // namespace COHOBATE_ISA
}  // namespace cohobate
