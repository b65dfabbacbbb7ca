// The family's forward kernels for CPUs: dtypes of 8 and 16 bits.
#include "sliding_window_extrema.h"

template void pyperf::sliding_window::extrema_on_cpu(const Extrema<int8_t>&);
template void pyperf::sliding_window::extrema_on_cpu(const Extrema<int16_t>&);
