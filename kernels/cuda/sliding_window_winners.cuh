// What becomes of winners: values gathered at them, their positions in the row. One thread an output.
#pragma once

#include "sliding_window_cells.cuh"

namespace pyperf::sliding_window {

struct OutputItem {
  int64_t row, output, lane;

  PYPERF_DEVICE OutputItem(int64_t item, int64_t outputs, int64_t lanes) {
    const cuda::Quotient by_lane = cuda::divide(item, lanes);
    const cuda::Quotient by_output = cuda::divide(by_lane.quotient, outputs);
    row = by_output.quotient, output = by_output.remainder, lane = by_lane.remainder;
  }
};

PYPERF_DEVICE int64_t winner_source(const Windows& w, int64_t output, int64_t tap) {
  return tap < 0 ? -1 : w.source(w.start(output) + tap * w.dilation);
}

template <class Bits>
__global__ void __launch_bounds__(256) winner_gather_kernel(WinnerGather<Bits> p, int64_t items) {
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; item < items; item += threads) {
    const OutputItem at(item, p.windows.out_length, p.lanes);
    int64_t row[3];
    p.rows.offsets(at.row, row);
    const int64_t tap = load_tap(p.offsets, p.offset, row[1] + at.lane + at.output * p.offsets_stride);
    const int64_t source = winner_source(p.windows, at.output, tap);
    p.y[row[2] + at.lane + at.output * p.y_stride] =
        source < 0 ? Bits(0) : p.values[row[0] + at.lane + source * p.values_stride];
  }
}

static __global__ void __launch_bounds__(256) winner_index_kernel(WinnerIndex p, int64_t items) {
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; item < items; item += threads) {
    const OutputItem at(item, p.windows.out_length, p.lanes);
    int64_t row[2];
    p.rows.offsets(at.row, row);
    const int64_t tap = load_tap(p.offsets, p.offset, row[0] + at.lane + at.output * p.offsets_stride);
    p.index[row[1] + at.lane + at.output * p.index_stride] = winner_source(p.windows, at.output, tap);
  }
}

template <class Bits>
cudaError_t winner_gather(const WinnerGather<Bits>& p, cudaStream_t stream) {
  const int64_t items = p.rows.count * p.windows.out_length * p.lanes;
  return cuda::launch(winner_gather_kernel<Bits>, (items + 255) / 256, 256, 0, stream, p, items);
}

inline cudaError_t winner_index(const WinnerIndex& p, cudaStream_t stream) {
  const int64_t items = p.rows.count * p.windows.out_length * p.lanes;
  return cuda::launch(winner_index_kernel, (items + 255) / 256, 256, 0, stream, p, items);
}

}  // namespace pyperf::sliding_window
