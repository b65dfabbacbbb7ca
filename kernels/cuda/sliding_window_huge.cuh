// Extrema of dense rows, windows longer than a tile. With window - 1 = whole * (words of a tile) + rest, an output is
// the maximum of the suffix of its own tile, the tiles 1 .. whole - 1 behind it and the head of the next one (the same
// for all outputs of the tile), and the prefix of the tile of words that starts window - 1 further. A first kernel
// leaves the maxima of all tiles and of their heads in the workspace, a second one those of kGroup tiles together.
#pragma once

#include "sliding_window_tile.cuh"

namespace pyperf::sliding_window {

constexpr int64_t kGroup = 64;
constexpr int kHugeThreads = 256;

struct HugeShape {
  int threads;
  int64_t output_tiles;   // of one row, a multiple of the halves of a word
  int64_t tiles, groups;  // of one row
  int64_t rows;
  int64_t whole;
  int rest;
};

// Maxima that one row, for one of the extrema, leaves in the workspace.
template <class Single>
struct TileMaxima {
  Single *tile, *head, *group;

  PYPERF_DEVICE TileMaxima(void* workspace, const HugeShape& shape, int64_t row_and_output) {
    tile = static_cast<Single*>(workspace) + row_and_output * (2 * shape.tiles + shape.groups);
    head = tile + shape.tiles;
    group = head + shape.tiles;
  }
};

template <class Cells>
PYPERF_DEVICE typename Cells::Cell lowest_cell() {
  return Cells::join(Cells::lowest(), Cells::lowest());
}

// The block's maximum, in every thread. `scratch` holds one cell a warp and is free again behind the next barrier.
template <class Cell>
PYPERF_DEVICE Cell block_maximum(Cell value, Cell* scratch) {
#pragma unroll
  for (int d = 16; d; d >>= 1) value = larger(value, shuffle_down(value, d));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[0];
  for (int warp = 1; warp < int(blockDim.x / 32); ++warp) value = larger(value, scratch[warp]);
  return value;
}

template <class Cells>
__global__ void __launch_bounds__(kHugeThreads, 2)
    tile_maxima_kernel(Extrema<typename Cells::Key> p, HugeShape shape, void* workspace) {
  using Cell = typename Cells::Cell;
  const int tile_words = shape.threads * Cells::kChunk;
  auto* words = reinterpret_cast<typename Cells::Word*>(cuda::dynamic_shared());
  auto* scratch = reinterpret_cast<Cell*>(words + padded_words<Cells>(tile_words));
  const int64_t blocks_of_row = shape.tiles / Cells::kHalves;
  for (int64_t block = blockIdx.x; block < shape.rows * blocks_of_row; block += gridDim.x) {
    const cuda::Quotient at = cuda::divide(block, blocks_of_row);
    int64_t row[2];
    p.rows.offsets(at.quotient, row);
    for (int n = 0; n < p.outputs; ++n) {
      const int64_t tile = at.remainder * Cells::kHalves;
      const int64_t first = tile * tile_words - line_shift(p.y[n] + row[1], p.windows, p.y_stride);
      const auto* loaded =
          load_words<Cells>({p.x + row[0], p.windows, p.key[n]}, first - p.windows.left, tile_words, tile_words, words);
      __syncthreads();
      Cell whole = lowest_cell<Cells>(), head = whole;
      for (int e = int(threadIdx.x); e < tile_words; e += shape.threads) {
        const Cell cell = Cells::cell(loaded[e], uint32_t(e), p.last);
        whole = larger(whole, cell);
        if (e < shape.rest) head = larger(head, cell);
      }
      whole = block_maximum(whole, scratch);
      head = block_maximum(head, scratch + 32);
      const TileMaxima<typename Cells::Single> maxima(workspace, shape, at.quotient * p.outputs + n);
      if (threadIdx.x < Cells::kHalves) {
        maxima.tile[tile + threadIdx.x] = Cells::half(whole, int(threadIdx.x));
        maxima.head[tile + threadIdx.x] = Cells::half(head, int(threadIdx.x));
      }
      __syncthreads();
    }
  }
}

template <class Cells>
__global__ void __launch_bounds__(128)
    group_maxima_kernel(HugeShape shape, int64_t rows_and_outputs, bool last, void* workspace) {
  const uint32_t tile_words = uint32_t(shape.threads) * Cells::kChunk;
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; item < rows_and_outputs * shape.groups;
       item += threads) {
    const cuda::Quotient at = cuda::divide(item, shape.groups);
    const TileMaxima<typename Cells::Single> maxima(workspace, shape, at.quotient);
    auto found = Cells::lowest();
    for (int k = 0; k < kGroup; ++k)
      found = larger(found, Cells::moved(maxima.tile[at.remainder * kGroup + k], uint32_t(k) * tile_words, last));
    maxima.group[at.remainder] = found;
  }
}

// This thread's part of the maximum of what lies between the tile and the leading words of its first output.
template <class Cells>
PYPERF_DEVICE typename Cells::Single part_between(const TileMaxima<typename Cells::Single>& maxima, int64_t tile,
                                                  const HugeShape& shape, bool last) {
  const uint32_t tile_words = uint32_t(shape.threads) * Cells::kChunk;
  auto found = Cells::lowest();
  auto take = [&](typename Cells::Single cell, int64_t of) {
    found = larger(found, Cells::moved(cell, uint32_t(of - tile) * tile_words, last));
  };
  const int64_t begin = tile + 1, end = tile + shape.whole;
  int64_t first_group = (begin + kGroup - 1) / kGroup, last_group = end / kGroup;
  if (last_group > shape.groups) last_group = shape.groups;
  if (first_group >= last_group) first_group = last_group = 0;
  const bool grouped = first_group < last_group;
  const int64_t loose_end = grouped ? first_group * kGroup : end;
  for (int64_t t = begin + threadIdx.x; t < loose_end; t += blockDim.x) take(maxima.tile[t], t);
  for (int64_t g = first_group + threadIdx.x; g < last_group; g += blockDim.x) take(maxima.group[g], g * kGroup);
  if (grouped)
    for (int64_t t = last_group * kGroup + threadIdx.x; t < end; t += blockDim.x) take(maxima.tile[t], t);
  if (shape.rest && threadIdx.x == 0) take(maxima.head[end], end);
  return found;
}

template <class Cells>
PYPERF_DEVICE typename Cells::Cell chunk_maximum(const typename Cells::Word* words, uint32_t position, bool last) {
  typename Cells::Cell cells[Cells::kChunk];
  load_chunk<Cells>(words, position, last, cells);
  return maximum(cells);
}

// The maximum of the chunks of the threads behind this one, and before it; a barrier lies between the two steps.
template <class Cells>
struct NeighbourScan {
  using Cell = typename Cells::Cell;
  Cell* warps;  // one cell a warp
  Cell inside;  // of this warp, this thread's chunk excluded

  PYPERF_DEVICE void begin_behind(Cell own) {
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) own = larger(own, shuffle_down(own, d));
    inside = shuffle_down(own, 1);
    if (threadIdx.x % 32 == 31) inside = lowest_cell<Cells>();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
  }
  PYPERF_DEVICE void begin_before(Cell own) {
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) own = larger(own, shuffle_up(own, d));
    inside = shuffle_up(own, 1);
    if (threadIdx.x % 32 == 0) inside = lowest_cell<Cells>();
    if (threadIdx.x % 32 == 31) warps[threadIdx.x / 32] = own;
  }
  PYPERF_DEVICE Cell over_warps(int begin, int end) const {
    Cell found = inside;
    for (int warp = begin; warp < end; ++warp) found = larger(found, warps[warp]);
    return found;
  }
};

template <class Cells>
__global__ void __launch_bounds__(kHugeThreads, 2)
    huge_kernel(Extrema<typename Cells::Key> p, HugeShape shape, void* workspace) {
  using Key = typename Cells::Key;
  using Cell = typename Cells::Cell;
  constexpr int kChunk = Cells::kChunk;
  const int tile_words = shape.threads * kChunk;
  const int buffer_words = padded_words<Cells>(tile_words);
  auto* words = reinterpret_cast<typename Cells::Word*>(cuda::dynamic_shared());
  auto* scratch = reinterpret_cast<Cell*>(words + 2 * buffer_words);
  auto* taps = reinterpret_cast<int32_t*>(scratch + 96);
  const int position = int(threadIdx.x) * kChunk;
  const int warp = int(threadIdx.x / 32), warps = shape.threads / 32;
  const int64_t dense = dense_outputs(p.windows);
  const int64_t blocks_of_row = shape.output_tiles / Cells::kHalves;

  for (int64_t block = blockIdx.x; block < shape.rows * blocks_of_row; block += gridDim.x) {
    const cuda::Quotient at = cuda::divide(block, blocks_of_row);
    int64_t row[2];
    p.rows.offsets(at.quotient, row);
    for (int n = 0; n < p.outputs; ++n) {
      Key* y = p.y[n] + row[1];
      const int64_t tile = at.remainder * Cells::kHalves;
      const int64_t first = tile * tile_words - line_shift(y, p.windows, p.y_stride);
      if (first >= dense) continue;  // the shift differs from one y to the other
      const RowSource<Key> source{p.x + row[0], p.windows, p.key[n]};
      const int64_t begin = first - p.windows.left;
      const auto* own = load_words<Cells>(source, begin, tile_words, tile_words, words);
      const auto* leading =
          load_words<Cells>(source, begin + p.windows.window - 1, tile_words, tile_words, words + buffer_words);
      const TileMaxima<typename Cells::Single> maxima(workspace, shape, at.quotient * p.outputs + n);
      const auto low = part_between<Cells>(maxima, tile, shape, p.last);
      const auto high = Cells::kHalves == 2 ? part_between<Cells>(maxima, tile + 1, shape, p.last) : low;
      const Cell between = block_maximum(Cells::join(low, high), scratch);

      NeighbourScan<Cells> behind{scratch + 32, between}, before{scratch + 64, between};
      behind.begin_behind(chunk_maximum<Cells>(own + position, uint32_t(position), p.last));
      const uint32_t leading_position = uint32_t(position + p.windows.window - 1);
      before.begin_before(chunk_maximum<Cells>(leading + position, leading_position, p.last));
      __syncthreads();
      Cell cells[kChunk], other[kChunk];
      load_chunk<Cells>(own + position, uint32_t(position), p.last, cells);
      suffix_maxima(cells, larger(between, behind.over_warps(warp + 1, warps)));
      load_chunk<Cells>(leading + position, leading_position, p.last, other);
      add_prefix_maxima(cells, other, before.over_warps(0, warp));
      const TileOutput<Key> out{p.windows,  p.key[n], y,      p.offsets[n],
                                row[1],     p.offset, p.last, int32_t(p.first_tap),
                                p.y_stride, first,    dense};
      write_tile<Cells>(out, cells, words, taps);
    }
  }
}

template <class Cells>
HugeShape huge_shape(const Extrema<typename Cells::Key>& p, int threads) {
  constexpr int64_t kHalves = Cells::kHalves;
  const Windows& w = p.windows;
  HugeShape shape{};
  shape.threads = threads;
  shape.rows = p.rows.count;
  const int64_t tile = int64_t(threads) * Cells::kChunk;
  const int64_t shift = w.stride == 1 && p.y_stride == 1 ? 128 / int64_t(sizeof(typename Cells::Key)) - 1 : 0;
  shape.whole = (w.window - 1) / tile;
  shape.rest = int((w.window - 1) % tile);
  shape.output_tiles = ((dense_outputs(w) + shift + tile - 1) / tile + kHalves - 1) / kHalves * kHalves;
  shape.tiles = (shape.output_tiles + shape.whole + kHalves - 1) / kHalves * kHalves;
  shape.groups = shape.whole > 2 * kGroup ? shape.tiles / kGroup : 0;
  return shape;
}

template <class Cells>
HugeShape best_huge_shape(const Extrema<typename Cells::Key>& p) {
  constexpr int64_t kEnoughBlocks = 512;
  int threads = kHugeThreads;
  while (threads > 64) {
    const HugeShape shape = huge_shape<Cells>(p, threads);
    if (shape.whole && shape.rows * shape.output_tiles >= kEnoughBlocks * Cells::kHalves) break;
    threads /= 2;
  }
  return huge_shape<Cells>(p, threads);
}

template <class Key, class Use>
auto with_huge_cells(const Extrema<Key>& p, Use use) {
  if (p.offset != OffsetType::none) return use(WinnerCells<Key>{});
  if constexpr (sizeof(Key) <= 2)
    return use(PairedCells<Key>{});
  else
    return use(PlainCells<Key>{});
}

template <class Key>
bool huge_fits(const Extrema<Key>& p) {
  return dense_rows(p) && with_huge_cells(p, [&](auto cells) { return best_huge_shape<decltype(cells)>(p).whole > 0; });
}

template <class Key>
int64_t huge_workspace_bytes(const Extrema<Key>& p) {
  return with_huge_cells(p, [&](auto cells) {
    const HugeShape shape = best_huge_shape<decltype(cells)>(p);
    return shape.rows * p.outputs * (2 * shape.tiles + shape.groups) *
           int64_t(sizeof(typename decltype(cells)::Single));
  });
}

template <class Key>
cudaError_t extrema_by_huge(const Extrema<Key>& p, void* workspace, cudaStream_t stream) {
  return with_huge_cells(p, [&](auto cells) {
    using Cells = decltype(cells);
    using Cell = typename Cells::Cell;
    const HugeShape shape = best_huge_shape<Cells>(p);
    const int tile_words = shape.threads * Cells::kChunk;
    const size_t buffer = size_t(padded_words<Cells>(tile_words)) * sizeof(typename Cells::Word);
    cudaError_t error = cuda::launch(tile_maxima_kernel<Cells>, shape.rows * (shape.tiles / Cells::kHalves),
                                     shape.threads, buffer + 64 * sizeof(Cell), stream, p, shape, workspace);
    if (error != cudaSuccess) return error;
    const int64_t groups = shape.rows * p.outputs * shape.groups;
    error = cuda::launch(group_maxima_kernel<Cells>, (groups + 127) / 128, 128, 0, stream, shape,
                         shape.rows * p.outputs, p.last, workspace);
    if (error != cudaSuccess) return error;
    const size_t taps = Cells::kWinners ? size_t(tile_words) * 4 : 0;
    return cuda::launch(huge_kernel<Cells>, shape.rows * (shape.output_tiles / Cells::kHalves), shape.threads,
                        2 * buffer + 96 * sizeof(Cell) + taps, stream, p, shape, workspace);
  });
}

}  // namespace pyperf::sliding_window
