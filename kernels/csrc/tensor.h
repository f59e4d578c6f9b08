// What every binding needs from the stable ABI: dtype codes, checks and pointers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "number.h"

namespace cohobate {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

inline Dtype dtype_of(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "expected float32 or bfloat16");
  return type == ScalarType::Float ? Dtype::f32 : Dtype::bf16;
}

}  // namespace cohobate
