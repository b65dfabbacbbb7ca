#include "simd.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <cstring>
#include <string>

namespace pyperf {
namespace {

SimdLevel highest_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return SimdLevel::x86_64_v4;
  if (__builtin_cpu_supports("x86-64-v3")) return SimdLevel::x86_64_v3;
#endif
  return SimdLevel::baseline;
}

constexpr const char* kNames[] = {"baseline", "x86-64-v3", "x86-64-v4"};

// A level that the processor lacks, or an unknown name, leaves the highest one in use.
SimdLevel chosen_level() {
  const SimdLevel highest = highest_level();
  const char* forced = std::getenv("PYPERF_SIMD");
  for (int level = 0; forced && level <= int(highest); ++level)
    if (std::strcmp(forced, kNames[level]) == 0) return SimdLevel(level);
  return highest;
}

const SimdLevel kLevel = chosen_level();

std::string simd() { return simd_level_name(); }

}  // namespace

SimdLevel simd_level() { return kLevel; }
const char* simd_level_name() { return kNames[int(kLevel)]; }

}  // namespace pyperf

STABLE_TORCH_LIBRARY_FRAGMENT(pyperf_dl, m) { m.def("_simd_level() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(pyperf_dl, CompositeExplicitAutograd, m) { m.impl("_simd_level", TORCH_BOX(&pyperf::simd)); }
