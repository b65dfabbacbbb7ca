// Sums of log-dets per sample, in double and in one order, whatever the launch looks like.
#pragma once

#include "../common/storage.h"
#include "common.cuh"

namespace pyperf::cuda {

// Adds v[0 .. size - 1] of a group of neighbouring threads into v[0], each thread with its own place in v. All threads
// of the block call this, `within` says who has a place.
PYPERF_DEVICE void sum_group(double* v, int place, int size, bool within) {
  int half = 1;
  while (half < size) half *= 2;
  for (half /= 2; half > 0; half /= 2) {
    __syncthreads();
    if (within && place < half && place + half < size) v[place] += v[place + half];
    size = half;
  }
  __syncthreads();
}

constexpr int kPartialsThreads = 128;

// partials: [samples, pieces, numbers], out: [samples, numbers]. A warp for each sum adds those of the pieces; none: 0.
template <class Out>
__global__ void __launch_bounds__(kPartialsThreads)
    sum_partials_kernel(const double* partials, int64_t samples, int64_t pieces, int64_t numbers, Out* out) {
  constexpr int kWarps = kPartialsThreads / 32;
  const int lane = int(threadIdx.x) % 32;
  for (int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; i < samples * numbers;
       i += int64_t(gridDim.x) * kWarps) {
    const Quotient sample = divide(i, numbers);
    const double* const first = partials + sample.quotient * pieces * numbers + sample.remainder;
    double sum = 0;
    for (int64_t piece = lane; piece < pieces; piece += 32) sum += first[piece * numbers];
    for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_down_sync(kWholeWarp, sum, delta);
    if (lane == 0) out[i] = Out(sum);
  }
}

template <class Out>
cudaError_t sum_partials(const double* partials, int64_t samples, int64_t pieces, int64_t numbers, void* out,
                         cudaStream_t stream) {
  constexpr int kWarps = kPartialsThreads / 32;
  return launch(sum_partials_kernel<Out>, (samples * numbers + kWarps - 1) / kWarps, kPartialsThreads, 0, stream,
                partials, samples, pieces, numbers, static_cast<Out*>(out));
}

}  // namespace pyperf::cuda
