// What splines and affine couplings share between torch and kernels/.
#pragma once

#include <vector>

#include "../kernels/common/storage.h"
#include "common/tensor.h"

namespace pyperf::coupling {

inline Storage storage_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return Storage::f16;
    case ScalarType::BFloat16: return Storage::bf16;
    case ScalarType::Float: return Storage::f32;
    case ScalarType::Double: return Storage::f64;
    default: require(false, "coupling: tensors must be float16, bfloat16, float32 or float64");
  }
  return Storage::f32;
}

inline ScalarType logdet_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The first `dims` sizes.
inline std::vector<int64_t> sizes_of(const Tensor& t, int64_t dims) {
  return {t.sizes().begin(), t.sizes().begin() + dims};
}

}  // namespace pyperf::coupling
