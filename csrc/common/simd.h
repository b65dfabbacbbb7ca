// Which SIMD level the CPU kernels run at: the highest that the processor has, or the one that PYPERF_SIMD names.
#pragma once

#include <type_traits>

namespace pyperf {

enum class SimdLevel : int { baseline = 0, x86_64_v3 = 1, x86_64_v4 = 2 };

// Read once, when the library is loaded.
SimdLevel simd_level();
const char* simd_level_name();

template <SimdLevel L>
using SimdConstant = std::integral_constant<SimdLevel, L>;

// visit(SimdConstant<level in use>())
template <class Visit>
void with_simd_level(const Visit& visit) {
  switch (simd_level()) {
#if defined(__x86_64__)
    case SimdLevel::x86_64_v4: return visit(SimdConstant<SimdLevel::x86_64_v4>());
    case SimdLevel::x86_64_v3: return visit(SimdConstant<SimdLevel::x86_64_v3>());
#endif
    default: return visit(SimdConstant<SimdLevel::baseline>());
  }
}

}  // namespace pyperf
