// The family's forward kernels for CPUs: dtypes of 32 and 64 bits.
#include "sliding_window_extrema.h"

template void pyperf::sliding_window::extrema_on_cpu(const Extrema<int32_t>&);
template void pyperf::sliding_window::extrema_on_cpu(const Extrema<int64_t>&);
