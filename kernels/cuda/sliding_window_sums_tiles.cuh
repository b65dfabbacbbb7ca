// Backward of dense rows, windows that a block's outputs cover: a block owns a range of grad_x, reads the outputs whose
// windows meet it, a leaf a thread, and has every run of its range as a whole. One kernel, nothing in between.
#pragma once

#include "sliding_window_sums.cuh"

namespace pyperf::sliding_window {

struct SumsTileShape {
  int threads;
  int inputs;      // of one tile
  int64_t tiles;   // of one row
  int64_t blocks;  // rows * tiles
  size_t shared_bytes;
};

constexpr int kSumsThreads = 512;
constexpr int kLeaves = int(kChunk / kLeaf);
constexpr int32_t kNoWinner = INT32_MIN;

// A leaf's outputs lie in a row of kLeaf + 1 words, so that the leaves of a warp start in different banks.
PYPERF_HD int leaf_slot(int output) { return output + output / int(kLeaf); }

template <class T>
struct SumsTile {
  using Sum = typename Accumulate<T>::type;
  using Ends = RunEnds<int32_t, Sum>;

  Sum* sums;       // [inputs]
  Sum* gradients;  // [leaf_slot(outputs)]
  Ends *leaves, *chunks;
  int32_t* winners;  // [leaf_slot(outputs)], relative to the tile's first input
  int inputs;

  PYPERF_DEVICE explicit SumsTile(const SumsTileShape& shape) : inputs(shape.inputs) {
    const int slots = leaf_slot(shape.threads * int(kLeaf));
    sums = reinterpret_cast<Sum*>(cuda::dynamic_shared());
    gradients = sums + inputs;
    leaves = reinterpret_cast<Ends*>(gradients + slots);
    chunks = leaves + shape.threads;
    winners = reinterpret_cast<int32_t*>(chunks + shape.threads / kLeaves);
  }

  PYPERF_DEVICE void write(int32_t winner, Sum sum) const {
    if (uint32_t(winner) < uint32_t(inputs)) sums[winner] = sum;
  }

  // Outputs [begin, begin + count) of the row; the rest of the tile has no winner.
  PYPERF_DEVICE void load(const WinnerSums<T>& p, const int64_t (&row)[3], int64_t first_input, int64_t begin,
                          int64_t count, int capacity) const {
#pragma unroll 4
    for (int e = int(threadIdx.x); e < capacity; e += int(blockDim.x)) {
      const bool held = e < count;
      const int64_t tap = held ? load_tap(p.offsets, p.offset, row[1] + begin + e) : -1;
      gradients[leaf_slot(e)] = held ? Sum(p.grad_y[row[0] + begin + e]) : Sum(0);
      const int64_t position = p.windows.start(begin + e) + tap;
      const bool wins = tap >= 0 && position >= 0 && position < p.windows.length;
      winners[leaf_slot(e)] = wins ? int32_t(position - first_input) : kNoWinner;
    }
    for (int j = int(threadIdx.x); j < inputs; j += int(blockDim.x)) sums[j] = 0;
    if (threadIdx.x < blockDim.x / kLeaves) chunks[threadIdx.x].runs = 0;
  }

  PYPERF_DEVICE void sum_leaf() const {
    Ends ends{};
    Total<Sum> run;
    int32_t winner = kNoWinner;
    const int slot = leaf_slot(int(threadIdx.x) * int(kLeaf));
#pragma unroll
    for (int k = 0; k < int(kLeaf); ++k) {
      const int32_t found = winners[slot + k];
      if (found == kNoWinner) continue;
      if (found != winner) {
        if (ends.runs == 1) ends.first = winner, ends.first_sum = run.sum;
        if (ends.runs > 1) write(winner, run.sum);
        ++ends.runs;
        winner = found;
        run = {};
      }
      run.add(gradients[slot + k]);
    }
    if (ends.runs == 1) ends.first = winner, ends.first_sum = run.sum;
    ends.last = winner, ends.last_sum = run.sum;
    leaves[threadIdx.x] = ends;
  }

  // The runs that begin in this thread's leaf, as far as its chunk goes.
  PYPERF_DEVICE void sum_chunk() const {
    const int leaf = int(threadIdx.x);
    const int in_chunk = leaf % kLeaves;
    const Ends ends = leaves[leaf];
    if (ends.runs == 0) return;
    Ends& chunk = chunks[leaf / kLeaves];
    const RunBegin begin =
        first_run_begin(ends, [&](int64_t k) { return in_chunk >= k ? leaves + leaf - k : nullptr; });
    const bool leads = begin == RunBegin::nothing_before;
    if (ends.runs > 1 && leads) chunk.first = ends.first, chunk.first_sum = ends.first_sum, chunk.runs = 2;
    if (ends.runs > 1 && begin == RunBegin::here) write(ends.first, ends.first_sum);
    if (ends.runs == 1 && begin == RunBegin::before) return;
    bool open;
    const Sum sum =
        whole_last_run(ends, open, [&](int64_t k) { return in_chunk + k < kLeaves ? leaves + leaf + k : nullptr; });
    const bool first_of_chunk = leads && ends.runs == 1;
    if (first_of_chunk) chunk.first = ends.last, chunk.first_sum = sum, chunk.runs = open ? 1 : 2;
    if (open) chunk.last = ends.last, chunk.last_sum = sum;
    if (!open && !first_of_chunk) write(ends.last, sum);
  }

  PYPERF_DEVICE void sum_crossing_runs() const {
    const int count = int(blockDim.x) / kLeaves;
    const int at = int(threadIdx.x);
    if (at >= count) return;
    const Ends ends = chunks[at];
    if (ends.runs == 0) return;
    const RunBegin begin = first_run_begin(ends, [&](int64_t k) { return at >= k ? chunks + at - k : nullptr; });
    if (begin != RunBegin::before && ends.runs > 1) write(ends.first, ends.first_sum);
    if (begin == RunBegin::before && ends.runs == 1) return;
    bool open;
    write(ends.last, whole_last_run(ends, open, [&](int64_t k) { return at + k < count ? chunks + at + k : nullptr; }));
  }
};

template <class T>
__global__ void __launch_bounds__(kSumsThreads, 2) sums_tiles_kernel(WinnerSums<T> p, SumsTileShape shape) {
  constexpr int kLine = 128 / int(sizeof(T));
  const Windows& w = p.windows;
  const SumsTile<T> tile(shape);
  for (int64_t block = blockIdx.x; block < shape.blocks; block += gridDim.x) {
    const cuda::Quotient at = cuda::divide(block, shape.tiles);
    int64_t row[3];
    p.rows.offsets(at.quotient, row);
    T* grad_x = p.grad_x + row[2];
    const int64_t first =
        at.remainder * shape.inputs - int64_t(reinterpret_cast<uintptr_t>(grad_x) / sizeof(T) % kLine);
    if (first >= w.length) continue;
    // Outputs whose windows meet the tile, from a whole chunk on.
    const int64_t reach = first + w.left - (w.window - 1);
    const int64_t begin = reach <= 0 ? 0 : cuda::divide(reach + w.stride - 1, w.stride).quotient / kChunk * kChunk;
    const int64_t behind = first + shape.inputs - 1 + w.left;
    int64_t end = behind < 0 ? 0 : cuda::divide(behind, w.stride).quotient + 1;
    if (end > w.out_length) end = w.out_length;
    tile.load(p, row, first, begin, end - begin, shape.threads * int(kLeaf));
    __syncthreads();
    tile.sum_leaf();
    __syncthreads();
    tile.sum_chunk();
    __syncthreads();
    tile.sum_crossing_runs();
    __syncthreads();
    for (int j = int(threadIdx.x); j < shape.inputs; j += shape.threads)
      if (first + j >= 0 && first + j < w.length) grad_x[first + j] = Accumulate<T>::store(tile.sums[j]);
    __syncthreads();
  }
}

// Inputs of a tile such that the outputs that meet it fit whatever the row's alignment is; <= 0 where none do.
template <class T>
SumsTileShape sums_tile_shape(const WinnerSums<T>& p, int threads) {
  using Tile = SumsTile<T>;
  const Windows& w = p.windows;
  SumsTileShape shape{};
  shape.threads = threads;
  const int64_t capacity = threads * kLeaf;
  const int64_t stride = w.stride < 4 ? w.stride : 4;  // a lower bound is enough
  int64_t inputs = (capacity - kChunk) * stride - w.window;
  if (inputs > 2 * capacity) inputs = 2 * capacity;
  shape.inputs = inputs < 0 ? 0 : int(inputs / 128 * 128);
  if (shape.inputs == 0) return shape;
  shape.tiles = (w.length + 128 / int64_t(sizeof(T)) - 1 + shape.inputs - 1) / shape.inputs;
  shape.blocks = shape.tiles * p.rows.count;
  const size_t slots = size_t(leaf_slot(int(capacity)));
  shape.shared_bytes = (size_t(shape.inputs) + slots) * sizeof(typename Tile::Sum) +
                       (size_t(threads) + size_t(threads / kLeaves)) * sizeof(typename Tile::Ends) + slots * 4;
  return shape;
}

template <class T>
SumsTileShape best_sums_tile_shape(const WinnerSums<T>& p) {
  SumsTileShape best{};
  for (int threads = 64; threads <= kSumsThreads; threads *= 2) {
    const SumsTileShape shape = sums_tile_shape(p, threads);
    if (shape.inputs == 0 || shape.shared_bytes > size_t(96) << 10) continue;
    // Work is threads * tiles; larger blocks share more of the windows' overlap, smaller ones idle less on short rows.
    if (best.inputs == 0 || shape.tiles * threads * 10 < best.tiles * best.threads * 9) best = shape;
  }
  return best;
}

template <class T>
bool sums_tiles_fit(const WinnerSums<T>& p) {
  const Windows& w = p.windows;
  if (p.lanes != 1 || p.grad_y_stride != 1 || p.offsets_stride != 1 || p.grad_x_stride != 1) return false;
  if (w.edge != Edge::constant || (w.dilation != 1 && w.window != 1)) return false;
  const SumsTileShape shape = best_sums_tile_shape(p);
  return shape.inputs > 0 && shape.inputs >= shape.threads * int(kLeaf) / 3;
}

template <class T>
cudaError_t winner_sums_by_tiles(const WinnerSums<T>& p, cudaStream_t stream) {
  const SumsTileShape shape = best_sums_tile_shape(p);
  return cuda::launch(sums_tiles_kernel<T>, shape.blocks, shape.threads, shape.shared_bytes, stream, p, shape);
}

}  // namespace pyperf::sliding_window
