#include "linear.h"

#include <optional>

#include "tensor.h"
#ifdef COHOBATE_X86
#include <cpuid.h>
#endif

namespace cohobate {

// Whether this processor has the pair instruction, and no matrix tiles (AMX), which torch's product would use and ours not.
static bool linear_is_fast() {
#ifdef COHOBATE_X86
  unsigned a, b, c, d;
  const bool amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
  return isa() == Isa::avx512bf16 && !amx;
#else
  return false;
#endif
}

static void check() { STD_TORCH_CHECK(linear_is_fast(), "linear: expected a processor with avx512_bf16 and without AMX"); }

template <class T>
static const T* read(const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); }

template <class T>
static T* write(Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); }

static void linear_binding(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Tensor out) {
  check();
#ifdef COHOBATE_X86
  avx512bf16::linear(read<bf16>(x), read<float>(weight), bias ? read<float>(*bias) : nullptr, write<bf16>(out), x.size(0),
                     x.size(1), weight.size(0));
#endif
}

static int64_t packed_size_binding(int64_t inputs, int64_t outputs) {
  check();
#ifdef COHOBATE_X86
  return avx512bf16::packed_size(inputs, outputs);
#endif
  return 0;
}

static void linear_pack_binding(const Tensor& weight, Tensor packed) {
  check();
#ifdef COHOBATE_X86
  avx512bf16::linear_pack(read<bf16>(weight), write<uint32_t>(packed), weight.size(1), weight.size(0));
#endif
}

static void linear_packed_binding(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t activation,
                                  Tensor out) {
  check();
#ifdef COHOBATE_X86
  avx512bf16::linear_packed(read<bf16>(x), read<uint32_t>(packed), bias ? read<bf16>(*bias) : nullptr,
                            static_cast<avx512bf16::Activation>(activation), write<bf16>(out), x.size(0), x.size(1), out.size(1));
#endif
}

static void linear_dx_binding(const Tensor& grad, const Tensor& weight, Tensor dx) {
  check();
#ifdef COHOBATE_X86
  avx512bf16::linear_dx(read<bf16>(grad), read<float>(weight), write<bf16>(dx), grad.size(0), weight.size(1), weight.size(0));
#endif
}

static void linear_dw_binding(const Tensor& grad, const Tensor& x, Tensor dweight, std::optional<Tensor> dbias) {
  check();
#ifdef COHOBATE_X86
  avx512bf16::linear_dw(read<bf16>(grad), read<bf16>(x), write<float>(dweight), dbias ? write<float>(*dbias) : nullptr,
                        grad.size(0), x.size(1), grad.size(1));
#endif
}

}  // namespace cohobate

STABLE_TORCH_LIBRARY_FRAGMENT(cohobate_native, m) {
  m.def("linear_is_fast() -> bool");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
  m.def("linear_packed_size(int inputs, int outputs) -> int");
  m.def("linear_pack(Tensor weight, Tensor(a!) packed) -> ()");
  m.def("linear_packed(Tensor x, Tensor packed, Tensor? bias, int activation, Tensor(a!) out) -> ()");
  m.def("linear_dx(Tensor grad, Tensor weight, Tensor(a!) dx) -> ()");
  m.def("linear_dw(Tensor grad, Tensor x, Tensor(a!) dweight, Tensor(b!)? dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cohobate_native, CompositeExplicitAutograd, m) {
  m.impl("linear_is_fast", TORCH_BOX(&cohobate::linear_is_fast));
  m.impl("linear_packed_size", TORCH_BOX(&cohobate::packed_size_binding));
}

STABLE_TORCH_LIBRARY_IMPL(cohobate_native, CPU, m) {
  m.impl("linear", TORCH_BOX(&cohobate::linear_binding));
  m.impl("linear_pack", TORCH_BOX(&cohobate::linear_pack_binding));
  m.impl("linear_packed", TORCH_BOX(&cohobate::linear_packed_binding));
  m.impl("linear_dx", TORCH_BOX(&cohobate::linear_dx_binding));
  m.impl("linear_dw", TORCH_BOX(&cohobate::linear_dw_binding));
}
