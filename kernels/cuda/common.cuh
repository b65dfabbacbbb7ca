// The little that every CUDA kernel needs: launching, the dynamic shared memory, 32-bit division where it fits.
// tests/native/cuda_emulator.h stands in for the CUDA compiler, so nothing else in kernels/cuda may use <<<>>>.
#pragma once

#include <cstdint>

#include "../common/platform.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#elif !defined(PYPERF_CUDA_EMULATOR)
#error "kernels/cuda needs nvcc or tests/native/cuda_emulator.h"
#endif

#define PYPERF_DEVICE __device__ __forceinline__

namespace pyperf::cuda {

constexpr uint32_t kWholeWarp = 0xffffffffu;

#if defined(__CUDACC__)
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ uint4 pyperf_dynamic_shared[];
  return reinterpret_cast<unsigned char*>(pyperf_dynamic_shared);
}

constexpr int64_t max_grid() { return INT32_MAX; }

template <class... P, class... A>
cudaError_t launch_exactly(void (*kernel)(P...), int64_t grid, int block, size_t shared_bytes, cudaStream_t stream,
                           A... arguments) {
  constexpr size_t kWithoutOptIn = 48 << 10;
  if (shared_bytes > kWithoutOptIn) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<unsigned(grid), unsigned(block), shared_bytes, stream>>>(P(arguments)...);
  return cudaGetLastError();
}
#else
inline unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(emulator::machine.shared.data()); }

inline int64_t max_grid() { return emulator::max_grid; }

template <class... P, class... A>
cudaError_t launch_exactly(void (*kernel)(P...), int64_t grid, int block, size_t shared_bytes, cudaStream_t,
                           A... arguments) {
  return emulator::launch(kernel, grid, block, shared_bytes, arguments...);
}
#endif

// Kernels walk `for (block = blockIdx.x; block < blocks; block += gridDim.x)`: more blocks than a grid holds are legal.
template <class Kernel, class... A>
cudaError_t launch(Kernel kernel, int64_t blocks, int block_size, size_t shared_bytes, cudaStream_t stream,
                   A... arguments) {
  if (blocks <= 0) return cudaSuccess;
  return launch_exactly(kernel, blocks < max_grid() ? blocks : max_grid(), block_size, shared_bytes, stream,
                        arguments...);
}

struct Quotient {
  int64_t quotient, remainder;
};

// 64-bit division is some hundred instructions on a GPU.
PYPERF_HD Quotient divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) {
    const uint32_t q = uint32_t(a) / uint32_t(b);
    return {int64_t(q), int64_t(uint32_t(a) - q * uint32_t(b))};
  }
  const int64_t q = a / b;
  return {q, a - q * b};
}

}  // namespace pyperf::cuda
