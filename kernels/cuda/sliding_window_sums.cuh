// Backward: every element of grad_x gets the sum of the gradients of the outputs it won, in the order that
// kernels/math/sliding_window.h states. No atomics, no dependence on the grid.
//
// The form for every layout: one thread sums the runs of one chunk of kChunk outputs and writes those that begin and
// end in it; the pieces that touch the chunk's ends go to the workspace, and a second kernel adds them up, chunk by
// chunk. With edges other than padding both work on padded positions, and a third kernel folds those onto the row.
#pragma once

#include "../math/half.h"
#include "sliding_window_cells.cuh"

namespace pyperf::sliding_window {

// The first and the last run of a stretch of outputs (one and the same where runs == 1).
template <class Position, class Sum>
struct RunEnds {
  Position first, last;
  Sum first_sum, last_sum;
  int32_t runs;  // two stands for more
};

template <class Sum>
using ChunkEnds = RunEnds<int64_t, Sum>;

enum class RunBegin { before, here, nothing_before };

// Where a stretch's first run begins; previous(k) is the k-th stretch before it, null where none can hold the winner.
template <class Ends, class Previous>
PYPERF_DEVICE RunBegin first_run_begin(const Ends& ends, Previous previous) {
  for (int64_t k = 1; const Ends* other = previous(k); ++k)
    if (other->runs) return other->last == ends.first ? RunBegin::before : RunBegin::here;
  return RunBegin::nothing_before;
}

// Adds to a stretch's last run what it has in the stretches next(1), next(2), ... up to null; `open`: it may go on.
template <class Ends, class Next>
PYPERF_DEVICE auto whole_last_run(const Ends& ends, bool& open, Next next) {
  auto sum = ends.last_sum;
  open = false;
  for (int64_t k = 1; const Ends* other = next(k); ++k) {
    if (other->runs == 0) continue;
    if (other->first != ends.last) return sum;
    sum += other->first_sum;
    if (other->runs > 1) return sum;
  }
  open = true;
  return sum;
}

template <class T>
struct SumsWorkspace {
  using Sum = typename Accumulate<T>::type;
  ChunkEnds<Sum>* ends;  // [rows, phases, chunks, lanes]
  Sum* padded;           // [rows, padded_length, lanes], null for padding edges
  int64_t chunks;        // of one phase
  int64_t items;         // rows * phases * chunks * lanes
};

template <class T>
struct ChunkItem {
  int64_t lane, phase, chunk, row;

  PYPERF_DEVICE ChunkItem(int64_t item, const WinnerSums<T>& p, const Phases& phases, int64_t chunks) {
    const cuda::Quotient by_lane = cuda::divide(item, p.lanes);
    const cuda::Quotient by_chunk = cuda::divide(by_lane.quotient, chunks);
    const cuda::Quotient by_phase = cuda::divide(by_chunk.quotient, phases.count);
    lane = by_lane.remainder, chunk = by_chunk.remainder, phase = by_phase.remainder, row = by_phase.quotient;
  }
};

// Where the sum of a position goes: grad_x, or the padded row.
template <class T>
struct SumSink {
  using Sum = typename Accumulate<T>::type;
  T* grad_x;
  int64_t grad_x_stride;
  Sum* padded;
  int64_t left, lanes;

  PYPERF_DEVICE SumSink(const WinnerSums<T>& p, const SumsWorkspace<T>& w, int64_t row, int64_t grad_x_row,
                        int64_t lane)
      : grad_x(p.grad_x + grad_x_row + lane),
        grad_x_stride(p.grad_x_stride),
        padded(w.padded ? w.padded + row * p.windows.padded_length() * p.lanes + lane : nullptr),
        left(p.windows.left),
        lanes(p.lanes) {}

  PYPERF_DEVICE void write(int64_t position, Sum sum) const {
    if (padded)
      padded[(position + left) * lanes] = sum;
    else
      grad_x[position * grad_x_stride] = Accumulate<T>::store(sum);
  }
};

// Adds values from left to right; the first one starts the sum, so that -0 survives.
template <class Sum>
struct Total {
  Sum sum = 0;
  bool some = false;

  PYPERF_DEVICE void add(Sum value) {
    sum = some ? sum + value : value;
    some = true;
  }
  PYPERF_DEVICE void add(const Total& other) {
    if (other.some) add(other.sum);
  }
};

template <class T>
__global__ void __launch_bounds__(128) chunk_sums_kernel(WinnerSums<T> p, SumsWorkspace<T> work) {
  using Sum = typename Accumulate<T>::type;
  const Phases phases(p.windows);
  const WinnerRange range(p.windows);
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; item < work.items; item += threads) {
    const ChunkItem<T> at(item, p, phases, work.chunks);
    int64_t row[3];
    p.rows.offsets(at.row, row);
    const SumSink<T> sink(p, work, at.row, row[2], at.lane);
    const int64_t begin = at.chunk * kChunk;
    int64_t end = phases.outputs(p.windows, at.phase);
    if (end > begin + kChunk) end = begin + kChunk;

    ChunkEnds<Sum> ends{};
    Total<Sum> run, leaf;
    int64_t winner = 0;
    auto close = [&] {
      run.add(leaf);
      if (ends.runs == 1)
        ends.first = winner, ends.first_sum = run.sum;
      else if (ends.runs > 1)
        sink.write(winner, run.sum);
    };
    for (int64_t c = begin; c < end; ++c) {
      const int64_t i = at.phase + c * phases.count;
      const int64_t tap = load_tap(p.offsets, p.offset, row[1] + at.lane + i * p.offsets_stride);
      if (c % kLeaf == 0) {
        run.add(leaf);
        leaf = {};
      }
      const int64_t position = p.windows.start(i) + tap * p.windows.dilation;
      if (tap < 0 || !range.holds(position)) continue;
      if (ends.runs == 0 || position != winner) {
        close();
        run = {}, leaf = {};
        winner = position;
        ++ends.runs;
      }
      leaf.add(Sum(p.grad_y[row[0] + at.lane + i * p.grad_y_stride]));
    }
    run.add(leaf);
    ends.last = winner, ends.last_sum = run.sum;
    if (ends.runs == 1) ends.first = winner, ends.first_sum = run.sum;
    work.ends[item] = ends;
  }
}

template <class T>
__global__ void __launch_bounds__(128) crossing_sums_kernel(WinnerSums<T> p, SumsWorkspace<T> work) {
  using Sum = typename Accumulate<T>::type;
  const Phases phases(p.windows);
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; item < work.items; item += threads) {
    const ChunkEnds<Sum> ends = work.ends[item];
    if (ends.runs == 0) continue;
    const ChunkItem<T> at(item, p, phases, work.chunks);
    const ChunkEnds<Sum>* own = work.ends + item;
    auto start = [&](int64_t chunk, int64_t output) {
      return p.windows.start(at.phase + (chunk * kChunk + output) * phases.count);
    };
    const RunBegin begin = first_run_begin(ends, [&](int64_t k) {
      const bool reached = at.chunk >= k && start(at.chunk - k, kChunk - 1) + p.windows.extent() > ends.first;
      return reached ? own - k * p.lanes : nullptr;
    });
    bool open;
    const Sum sum = whole_last_run(ends, open, [&](int64_t k) {
      const bool reached = at.chunk + k < work.chunks && start(at.chunk + k, 0) <= ends.last;
      return reached ? own + k * p.lanes : nullptr;
    });
    int64_t row[3];
    p.rows.offsets(at.row, row);
    const SumSink<T> sink(p, work, at.row, row[2], at.lane);
    if (begin != RunBegin::before && ends.runs > 1) sink.write(ends.first, ends.first_sum);
    if (begin != RunBegin::before || ends.runs > 1) sink.write(ends.last, sum);
  }
}

// What no run reaches is zero.
template <class T>
__global__ void __launch_bounds__(256)
    zero_sums_kernel(WinnerSums<T> p, SumsWorkspace<T> work, int64_t positions, int64_t items) {
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; item < items; item += threads) {
    if (work.padded) {
      work.padded[item] = 0;
      continue;
    }
    const cuda::Quotient by_lane = cuda::divide(item, p.lanes);
    const cuda::Quotient by_position = cuda::divide(by_lane.quotient, positions);
    int64_t row[3];
    p.rows.offsets(by_position.quotient, row);
    p.grad_x[row[2] + by_lane.remainder + by_position.remainder * p.grad_x_stride] = Accumulate<T>::store(0);
  }
}

// Calls visit(position) for the padded positions but j itself that read element j, in ascending order.
template <class Visit>
PYPERF_DEVICE void for_each_image(const Windows& w, int64_t j, Visit visit) {
  const int64_t low = -w.left;
  const int64_t high = low + w.padded_length();
  if (w.edge == Edge::nearest) {
    if (j == 0)
      for (int64_t position = low; position < 0 && position < high; ++position) visit(position);
    if (j == w.length - 1)
      for (int64_t position = low > w.length ? low : w.length; position < high; ++position) visit(position);
    return;
  }
  const bool single = w.edge == Edge::mirror && w.length == 1;
  const int64_t period = w.edge == Edge::wrap || single ? w.length
                         : w.edge == Edge::reflect      ? 2 * w.length
                                                        : 2 * w.length - 2;
  const int64_t twin = w.edge == Edge::reflect ? period - 1 - j : w.edge == Edge::mirror && !single ? period - j : j;
  int64_t base = low / period * period;
  if (base > low) base -= period;
  for (; base < high; base += period) {
    const int64_t image = base + j;
    const int64_t mirrored = base + twin;
    if (image >= low && image < high && base != 0) visit(image);
    if (twin != j && twin != period && mirrored >= low && mirrored < high) visit(mirrored);
  }
}

template <class T>
__global__ void __launch_bounds__(256) fold_sums_kernel(WinnerSums<T> p, SumsWorkspace<T> work, int64_t items) {
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  const int64_t padded_length = p.windows.padded_length();
  for (int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; item < items; item += threads) {
    const cuda::Quotient by_lane = cuda::divide(item, p.lanes);
    const cuda::Quotient by_element = cuda::divide(by_lane.quotient, p.windows.length);
    const int64_t lane = by_lane.remainder;
    const int64_t j = by_element.remainder;
    const auto* padded = work.padded + by_element.quotient * padded_length * p.lanes + lane;
    const int64_t own = j + p.windows.left;
    typename Accumulate<T>::type sum = own >= 0 && own < padded_length ? padded[own * p.lanes] : 0;
    for_each_image(p.windows, j, [&](int64_t position) { sum += padded[(position + p.windows.left) * p.lanes]; });
    int64_t row[3];
    p.rows.offsets(by_element.quotient, row);
    p.grad_x[row[2] + lane + j * p.grad_x_stride] = Accumulate<T>::store(sum);
  }
}

template <class T>
SumsWorkspace<T> sums_workspace(const WinnerSums<T>& p, void* memory) {
  const Phases phases(p.windows);
  SumsWorkspace<T> work;
  work.chunks = (phases.outputs(p.windows, 0) + kChunk - 1) / kChunk;
  work.items = p.rows.count * phases.count * work.chunks * p.lanes;
  work.ends = static_cast<ChunkEnds<typename Accumulate<T>::type>*>(memory);
  work.padded = p.windows.edge == Edge::constant
                    ? nullptr
                    : reinterpret_cast<typename Accumulate<T>::type*>(work.ends + work.items);
  return work;
}

template <class T>
int64_t chunked_sums_workspace_bytes(const WinnerSums<T>& p) {
  using Sum = typename Accumulate<T>::type;
  const int64_t padded = p.windows.edge == Edge::constant ? 0 : p.rows.count * p.windows.padded_length() * p.lanes;
  return sums_workspace(p, nullptr).items * int64_t(sizeof(ChunkEnds<Sum>)) + padded * int64_t(sizeof(Sum));
}

template <class T>
cudaError_t winner_sums_by_chunks(const WinnerSums<T>& p, void* memory, cudaStream_t stream) {
  const SumsWorkspace<T> work = sums_workspace(p, memory);
  const int64_t positions = work.padded ? p.windows.padded_length() : p.windows.length;
  const int64_t zeros = p.rows.count * positions * p.lanes;
  cudaError_t error = cuda::launch(zero_sums_kernel<T>, (zeros + 255) / 256, 256, 0, stream, p, work, positions, zeros);
  if (error != cudaSuccess) return error;
  const int64_t blocks = (work.items + 127) / 128;
  error = cuda::launch(chunk_sums_kernel<T>, blocks, 128, 0, stream, p, work);
  if (error != cudaSuccess) return error;
  error = cuda::launch(crossing_sums_kernel<T>, blocks, 128, 0, stream, p, work);
  if (error != cudaSuccess || !work.padded) return error;
  const int64_t elements = p.rows.count * p.windows.length * p.lanes;
  return cuda::launch(fold_sums_kernel<T>, (elements + 255) / 256, 256, 0, stream, p, work, elements);
}

}  // namespace pyperf::sliding_window
