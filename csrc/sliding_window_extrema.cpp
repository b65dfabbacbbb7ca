// The family's forward kernels for CPUs, which take longest to compile.
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
template void extrema_on_cpu(const Extrema<int8_t>&);
template void extrema_on_cpu(const Extrema<int16_t>&);
template void extrema_on_cpu(const Extrema<int32_t>&);
template void extrema_on_cpu(const Extrema<int64_t>&);

}  // namespace pyperf::sliding_window
