// The family's forward kernels for CPUs. They take longest to compile, so two sources share them.
#pragma once

#include <cstring>
#include <utility>

#include "../kernels/math/sliding_window.h"
#include "common/simd.h"
#include "sliding_window.h"

namespace pyperf {
using namespace sliding_window;
}
#define PYPERF_SIMD_BODY "sliding_window.h"  // the one in kernels/cpu
#include "../kernels/cpu/simd_levels.h"

namespace pyperf::sliding_window {

template <class Key>
void extrema_on_cpu(const Extrema<Key>& p) {
  PYPERF_AT_SIMD_LEVEL(extrema<Key, TorchThreads>)(p, TorchThreads());
}

}  // namespace pyperf::sliding_window
