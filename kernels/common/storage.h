// Float dtypes as they lie in memory.
#pragma once

#include <cstdint>

#include "../math/half.h"

namespace pyperf {

enum class Storage : int { f16, bf16, f32, f64 };

PYPERF_HD constexpr int storage_bytes(Storage type) { return type == Storage::f64 ? 8 : type == Storage::f32 ? 4 : 2; }

// visit(S()) with the type of the elements.
template <class Visit>
PYPERF_HD void with_storage(Storage type, const Visit& visit) {
  switch (type) {
    case Storage::f16: return visit(Float16());
    case Storage::bf16: return visit(BFloat16());
    case Storage::f32: return visit(float());
    case Storage::f64: return visit(double());
  }
}

// Between storage and the arithmetic; 16-bit types round once, from float.
template <class R, class S>
PYPERF_HD R loaded(S s) {
  if constexpr (sizeof(S) == 2)
    return R(float(s));
  else
    return R(s);
}
template <class S, class R>
PYPERF_HD S stored(R r) {
  if constexpr (sizeof(S) == 2)
    return S::from(float(r));
  else
    return S(r);
}

}  // namespace pyperf
