// The library itself; each family adds its ops with STABLE_TORCH_LIBRARY_FRAGMENT in a file of its own.
#include "isa.h"
#include "tensor.h"

static int64_t instruction_set() { return static_cast<int64_t>(cohobate::isa()); }

STABLE_TORCH_LIBRARY(cohobate_native, m) { m.def("instruction_set() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(cohobate_native, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}
