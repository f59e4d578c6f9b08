// Run-time choice between the instruction sets that the *.kernel.cpp files were compiled for.
//
// A kernel is declared in its header inside COHOBATE_KERNELS(...), which repeats the declarations for every instruction
// set, and defined in a *.kernel.cpp inside namespace cohobate::COHOBATE_ISA. A binding calls COHOBATE_DISPATCH(name)(...).
#pragma once

namespace cohobate {

enum class Isa { generic = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };

inline Isa isa() {
#ifdef COHOBATE_X86
  static const Isa chosen = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
      return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
    return Isa::generic;
  }();
  return chosen;
#else
  return Isa::generic;
#endif
}

}  // namespace cohobate

#define COHOBATE_KERNELS(...)                         \
  namespace cohobate { namespace generic { __VA_ARGS__ } } \
  namespace cohobate { namespace avx2 { __VA_ARGS__ } }    \
  namespace cohobate { namespace avx512 { __VA_ARGS__ } }  \
  namespace cohobate { namespace avx512bf16 { __VA_ARGS__ } }

#ifdef COHOBATE_X86
#define COHOBATE_DISPATCH(name)                                   \
  (::cohobate::isa() == ::cohobate::Isa::avx512bf16 ? ::cohobate::avx512bf16::name \
   : ::cohobate::isa() == ::cohobate::Isa::avx512 ? ::cohobate::avx512::name \
   : ::cohobate::isa() == ::cohobate::Isa::avx2 ? ::cohobate::avx2::name   \
                                                : ::cohobate::generic::name)
#else
#define COHOBATE_DISPATCH(name) (::cohobate::generic::name)
#endif
