// Which SIMD level the CPU kernels run at: the highest that the processor has, or the one that PYPERF_SIMD names.
#pragma once

namespace pyperf {

enum class SimdLevel : int { baseline = 0, x86_64_v3 = 1, x86_64_v4 = 2 };

// Read once, when the library is loaded.
SimdLevel simd_level();
const char* simd_level_name();

// A function of kernels/cpu/simd_levels.h at the level in use.
#if defined(__x86_64__)
#define PYPERF_AT_SIMD_LEVEL(...)                                                                 \
  (::pyperf::simd_level() == ::pyperf::SimdLevel::x86_64_v4   ? &::pyperf::x86_64_v4::__VA_ARGS__ \
   : ::pyperf::simd_level() == ::pyperf::SimdLevel::x86_64_v3 ? &::pyperf::x86_64_v3::__VA_ARGS__ \
                                                              : &::pyperf::baseline::__VA_ARGS__)
#else
#define PYPERF_AT_SIMD_LEVEL(...) (&::pyperf::baseline::__VA_ARGS__)
#endif

}  // namespace pyperf
