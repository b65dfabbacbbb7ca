// Extrema of every layout, van Herk/Gil-Werman with one thread a segment: outputs whose windows share a pivot element
// are the maximum of a suffix before the pivot and a prefix from it on. Neighbouring threads take neighbouring lanes,
// then phases. The suffixes wait in the output, as bare keys, until the prefix meets them.
#pragma once

#include "sliding_window_cells.cuh"

namespace pyperf::sliding_window {

struct SegmentShape {
  int64_t outputs;   // of one segment
  int64_t segments;  // of one phase
  int64_t items;     // rows * segments * phases * lanes
};

template <class Key, bool kOffsets>
struct SegmentWalk {
  using Cell = std::conditional_t<kOffsets, Winner<Key>, Key>;

  const Extrema<Key>& p;
  const OrderedKey<Key>& key;
  int n;          // which of the extrema
  const Key* x;   // the row's first element, this thread's lane
  int64_t y_row;  // the same for y and offsets
  int64_t phase;
  int64_t begin, end;  // outputs of the phase
  Phases phases;

  PYPERF_DEVICE int64_t output(int64_t c) const { return phase + c * phases.count; }
  PYPERF_DEVICE int64_t y_index(int64_t c) const { return y_row + output(c) * p.y_stride; }

  // Dense window k of the segment starts at the k-th position.
  PYPERF_DEVICE Cell lowest() const {
    if constexpr (kOffsets)
      return {OrderedKey<Key>::kLowest, 0};
    else
      return OrderedKey<Key>::kLowest;
  }
  PYPERF_DEVICE Cell at(int64_t k) const {
    const Windows& w = p.windows;
    const int64_t source = w.source(w.start(output(begin)) + k * w.dilation);
    const Key found = source < 0 ? OrderedKey<Key>::kLowest : key.encode(x[source * p.x_stride]);
    if constexpr (kOffsets)
      return {found, rank(uint32_t(k), p.last)};
    else
      return found;
  }

  PYPERF_DEVICE void park(int64_t c, Cell cell) const {
    if constexpr (kOffsets) {
      p.y[n][y_index(c)] = cell.key;
      store_tap(p.offsets[n], p.offset, y_index(c), int64_t(rank(cell.rank, p.last)) - (c - begin) * phases.step);
    } else {
      p.y[n][y_index(c)] = cell;
    }
  }
  PYPERF_DEVICE Cell parked(int64_t c) const {
    const Key found = p.y[n][y_index(c)];
    if constexpr (kOffsets) {
      const int64_t tap = load_tap(p.offsets[n], p.offset, y_index(c));
      return {found, rank(uint32_t(tap + (c - begin) * phases.step), p.last)};
    } else {
      return found;
    }
  }
  PYPERF_DEVICE void finish(int64_t c, Cell cell) const {
    if constexpr (kOffsets) {
      const int64_t tap = cell.key == OrderedKey<Key>::kLowest
                              ? lowest_tap(p.windows, p.windows.start(output(c)), p.last, is_floating(key))
                              : int64_t(rank(cell.rank, p.last)) - (c - begin) * phases.step;
      store_tap(p.offsets[n], p.offset, y_index(c), tap < 0 ? -1 : tap + p.first_tap);
      p.y[n][y_index(c)] = key.decode(cell.key);
    } else {
      p.y[n][y_index(c)] = key.decode(cell);
    }
  }

  PYPERF_DEVICE void run() const {
    const int64_t step = phases.step;
    const int64_t pivot = (end - 1 - begin) * step;
    Cell suffix = lowest();
    int64_t k = pivot - 1;
    for (int64_t c = end - 2; c >= begin; --c) {
      for (; k >= (c - begin) * step; --k) suffix = larger(suffix, at(k));
      park(c, suffix);
    }
    Cell prefix = lowest();
    k = pivot;
    for (int64_t c = begin; c < end; ++c) {
      for (; k < (c - begin) * step + p.windows.window; ++k) prefix = larger(prefix, at(k));
      finish(c, c < end - 1 ? larger(parked(c), prefix) : prefix);
    }
  }
};

template <class Key, bool kOffsets>
__global__ void __launch_bounds__(128) segments_kernel(Extrema<Key> p, SegmentShape shape) {
  const Phases phases(p.windows);
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; item < shape.items; item += threads) {
    const cuda::Quotient lane = cuda::divide(item, p.lanes);
    const cuda::Quotient phase = cuda::divide(lane.quotient, phases.count);
    const cuda::Quotient segment = cuda::divide(phase.quotient, shape.segments);
    const int64_t begin = segment.remainder * shape.outputs;
    int64_t end = begin + shape.outputs;
    const int64_t outputs = phases.outputs(p.windows, phase.remainder);
    if (end > outputs) end = outputs;
    if (begin >= end) continue;
    int64_t row[2];
    p.rows.offsets(segment.quotient, row);
    for (int n = 0; n < p.outputs; ++n)
      SegmentWalk<Key, kOffsets>{
          p, p.key[n], n, p.x + row[0] + lane.remainder, row[1] + lane.remainder, phase.remainder, begin, end, phases}
          .run();
  }
}

template <class Key>
cudaError_t extrema_by_segments(const Extrema<Key>& p, cudaStream_t stream) {
  constexpr int kThreads = 128;
  const Phases phases(p.windows);
  SegmentShape shape;
  shape.outputs = p.windows.window / phases.step + 1;
  shape.segments = (phases.outputs(p.windows, 0) + shape.outputs - 1) / shape.outputs;
  shape.items = p.rows.count * shape.segments * phases.count * p.lanes;
  const int64_t blocks = (shape.items + kThreads - 1) / kThreads;
  return p.offset == OffsetType::none ? cuda::launch(segments_kernel<Key, false>, blocks, kThreads, 0, stream, p, shape)
                                      : cuda::launch(segments_kernel<Key, true>, blocks, kThreads, 0, stream, p, shape);
}

}  // namespace pyperf::sliding_window
