// PYPERF_HD marks scalar functions that are compiled for the CPU and for CUDA from one source.
#pragma once

#if defined(__CUDACC__)
#define PYPERF_HD __host__ __device__ __forceinline__
#else
#define PYPERF_HD __attribute__((always_inline)) inline
#endif
