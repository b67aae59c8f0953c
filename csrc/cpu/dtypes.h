// The dtypes of activations, as the vectorised kernels name them.
#pragma once

#include "../tensors.h"
#include "kernels.h"

namespace neumuter::cpu {

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      STD_TORCH_CHECK(false, "activations and logits must be float32, float64, bfloat16 or float16");
  }
}

}  // namespace neumuter::cpu
