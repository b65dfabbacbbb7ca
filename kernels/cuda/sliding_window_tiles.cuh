// Extrema of dense rows, windows that shared memory holds. Thread t of a block owns the outputs of chunk t. With
// window - 1 = whole * kChunk + rest, an output is the maximum of
//   the suffix of its own chunk, the chunks 1 .. whole - 1 behind it and the head of the next one (the same for all
//   outputs of the chunk), and the prefix of the chunk of words that starts window - 1 further.
// Windows inside a chunk grow in registers instead, by doubling and then by the binary digits of what is left.
#pragma once

#include "sliding_window_tile.cuh"

namespace pyperf::sliding_window {

struct TileShape {
  int threads;
  int64_t tiles;   // of one row
  int64_t blocks;  // rows * tiles
  int whole, rest;
  int group;   // chunks whose maxima are scanned together: the largest power of two <= min(whole - 1, 32)
  int words;   // of shared memory, in Word
  int chunks;  // of shared memory, in Cell; 0 for windows inside a chunk
  size_t shared_bytes;
};

template <class Cells>
struct ChunkMaxima {
  typename Cells::Cell *suffix, *prefix, *head;  // within groups; head: of the chunk's first `rest` cells

  PYPERF_DEVICE void publish(int chunk, const typename Cells::Cell (&cells)[Cells::kChunk],
                             const TileShape& shape) const {
    auto from_left = maximum(cells);
    auto from_right = from_left;
    for (int d = 1; d < shape.group; d <<= 1) {
      from_left = larger(from_left, shuffle_up(from_left, d, shape.group));
      from_right = larger(from_right, shuffle_down(from_right, d, shape.group));
    }
    prefix[chunk] = from_left;
    suffix[chunk] = from_right;
    auto first = cells[0];
#pragma unroll
    for (int v = 1; v < Cells::kChunk; ++v)
      if (v < shape.rest) first = larger(first, cells[v]);
    head[chunk] = first;
  }

  // What lies between the chunk and the leading words of its first output; never empty but for rest == 0, whole == 1.
  PYPERF_DEVICE typename Cells::Cell between(int chunk, typename Cells::Cell own, const TileShape& shape) const {
    auto found = shape.rest ? head[chunk + shape.whole] : own;
    if (shape.whole < 2) return found;
    const int begin = chunk + 1, end = chunk + shape.whole - 1;
    found = larger(found, larger(suffix[begin], prefix[end]));
    for (int g = begin / shape.group + 1; g < end / shape.group; ++g)
      found = larger(found, prefix[(g + 1) * shape.group - 1]);
    return found;
  }
};

template <class Cells>
PYPERF_DEVICE void wide_windows(const typename Cells::Word* words, int64_t window, bool last, const TileShape& shape,
                                const ChunkMaxima<Cells>& maxima, typename Cells::Cell (&cells)[Cells::kChunk]) {
  constexpr int kChunk = Cells::kChunk;
  const int chunk = int(threadIdx.x);
  const int chunks = shape.threads + shape.whole;
  typename Cells::Cell other[kChunk];
  for (int c = chunk + shape.threads; c - chunk % 32 < chunks; c += shape.threads) {
    const int position = (c < chunks ? c : chunks - 1) * kChunk;
    load_chunk<Cells>(words + position, position, last, other);
    maxima.publish(c, other, shape);
  }
  load_chunk<Cells>(words + chunk * kChunk, chunk * kChunk, last, cells);
  maxima.publish(chunk, cells, shape);
  __syncthreads();
  suffix_maxima(cells, maxima.between(chunk, cells[kChunk - 1], shape));
  const int leading = chunk * kChunk + int(window) - 1;
  load_chunk<Cells>(words + leading, leading, last, other);
  add_prefix_maxima(cells, other, other[0]);
}

template <int kDistance, class Cell, int kCount>
PYPERF_DEVICE void widen(Cell (&cells)[kCount]) {
#pragma unroll
  for (int v = 0; v + kDistance < kCount; ++v) cells[v] = larger(cells[v], cells[v + kDistance]);
}

template <class Cells>
PYPERF_DEVICE void narrow_windows(const typename Cells::Word* words, int window, bool last,
                                  typename Cells::Cell (&cells)[Cells::kChunk]) {
  constexpr int kChunk = Cells::kChunk;
  constexpr int kReach = 2 * kChunk - 1;
  const int position = int(threadIdx.x) * kChunk;
  typename Cells::Cell grown[kReach];
#pragma unroll
  for (int v = 0; v < kReach; ++v) {
    const int held = v < kChunk + window - 1 ? v : kChunk + window - 2;
    grown[v] = Cells::cell(words[position + held], uint32_t(position + held), last);
  }
  if (window >= 2) widen<1>(grown);
  if (window >= 4) widen<2>(grown);
  if (window >= 8) widen<4>(grown);
  if (window >= 16) widen<8>(grown);
  const int doubled = window >= 16 ? 16 : window >= 8 ? 8 : window >= 4 ? 4 : window >= 2 ? 2 : 1;
  const int rest = window - doubled;
  if (rest & 1) widen<1>(grown);
  if (rest & 2) widen<2>(grown);
  if (rest & 4) widen<4>(grown);
#pragma unroll
  for (int v = 0; v < kChunk; ++v) cells[v] = grown[v];
}

template <class Cells>
__global__ void __launch_bounds__(Cells::kMaxThreads, Cells::kMinBlocks)
    tiles_kernel(Extrema<typename Cells::Key> p, TileShape shape) {
  using Key = typename Cells::Key;
  using Cell = typename Cells::Cell;
  auto* words = reinterpret_cast<typename Cells::Word*>(cuda::dynamic_shared());
  auto* cells_shared = reinterpret_cast<Cell*>(words + shape.words);
  const ChunkMaxima<Cells> maxima{cells_shared, cells_shared + shape.chunks, cells_shared + 2 * shape.chunks};
  auto* taps = reinterpret_cast<int32_t*>(cells_shared + 3 * shape.chunks);
  const int tile_words = shape.threads * Cells::kChunk;
  const int64_t dense = dense_outputs(p.windows);

  for (int64_t block = blockIdx.x; block < shape.blocks; block += gridDim.x) {
    const cuda::Quotient at = cuda::divide(block, shape.tiles);
    int64_t row[2];
    p.rows.offsets(at.quotient, row);
    for (int n = 0; n < p.outputs; ++n) {
      Key* y = p.y[n] + row[1];
      const int64_t first = at.remainder * tile_words * Cells::kHalves - line_shift(y, p.windows, p.y_stride);
      if (first >= dense) continue;  // the shift differs from one y to the other
      const RowSource<Key> source{p.x + row[0], p.windows, p.key[n]};
      const auto* loaded =
          load_words<Cells>(source, first - p.windows.left, tile_words + int(p.windows.window) - 1, tile_words, words);
      __syncthreads();
      Cell cells[Cells::kChunk];
      if (shape.chunks)
        wide_windows<Cells>(loaded, p.windows.window, p.last, shape, maxima, cells);
      else
        narrow_windows<Cells>(loaded, int(p.windows.window), p.last, cells);
      const TileOutput<Key> out{p.windows,  p.key[n], y,      p.offsets[n],
                                row[1],     p.offset, p.last, int32_t(p.first_tap),
                                p.y_stride, first,    dense};
      write_tile<Cells>(out, cells, words, taps);
    }
  }
}

constexpr size_t kTileSharedBytes = size_t(96) << 10;  // every device since sm_80 grants 99 KiB

template <class Cells>
TileShape tile_shape(const Extrema<typename Cells::Key>& p, int threads) {
  using Key = typename Cells::Key;
  constexpr int kChunk = Cells::kChunk;
  const Windows& w = p.windows;
  TileShape shape{};
  shape.threads = threads;
  const int64_t tile_words = int64_t(threads) * kChunk;
  const int64_t tile = tile_words * Cells::kHalves;
  const int64_t shift = w.stride == 1 && p.y_stride == 1 ? 128 / int64_t(sizeof(Key)) - 1 : 0;
  shape.tiles = (dense_outputs(w) + shift + tile - 1) / tile;
  shape.blocks = shape.tiles * p.rows.count;
  const int64_t words = tile_words + w.window - 1;
  shape.words = padded_words<Cells>(words);
  if (w.window > kChunk) {
    shape.whole = int((w.window - 1) / kChunk);
    shape.rest = int((w.window - 1) % kChunk);
    shape.group = 1;
    while (shape.group < 32 && shape.group * 2 < shape.whole) shape.group *= 2;
    shape.chunks = (threads + shape.whole + 31) / 32 * 32;
  }
  shape.shared_bytes = size_t(shape.words) * sizeof(typename Cells::Word) +
                       size_t(3 * shape.chunks) * sizeof(typename Cells::Cell) +
                       (Cells::kWinners ? size_t(tile_words) * 4 : 0);
  return shape;
}

// Blocks as large as the row fills them; smaller ones where they would be too few for a GPU.
template <class Cells>
TileShape best_tile_shape(const Extrema<typename Cells::Key>& p) {
  constexpr int kLargest = Cells::kMaxThreads;
  constexpr int64_t kEnoughBlocks = 512;
  TileShape best = tile_shape<Cells>(p, kLargest);
  for (int threads = kLargest / 2; threads >= 64; threads /= 2) {
    const TileShape shape = tile_shape<Cells>(p, threads);
    const bool less_idle = shape.tiles * threads * 10 < best.tiles * best.threads * 9;
    const bool more_blocks = best.blocks < kEnoughBlocks && p.windows.window < int64_t(threads) * Cells::kChunk;
    if (less_idle || more_blocks || best.shared_bytes > kTileSharedBytes) best = shape;
  }
  return best;
}

// Calls use(cells) with the cells that serve the problem's tiles.
template <class Key, class Use>
auto with_tile_cells(const Extrema<Key>& p, Use use) {
  if constexpr (sizeof(Key) <= 2) {
    if (p.offset == OffsetType::none) return use(PairedCells<Key>{});
    return use(NarrowWinnerCells<Key>{});
  } else {
    if (p.offset == OffsetType::none) return use(PlainCells<Key>{});
    return use(WinnerCells<Key>{});
  }
}

template <class Key>
bool tiles_fit(const Extrema<Key>& p) {
  if (!dense_rows(p) || p.windows.window > int64_t(kTileSharedBytes)) return false;
  return with_tile_cells(p, [&](auto cells) {
    const TileShape shape = best_tile_shape<decltype(cells)>(p);
    const bool narrow = sizeof(Key) <= 2 && p.offset != OffsetType::none;
    return shape.shared_bytes <= kTileSharedBytes && (!narrow || shape.words < 1 << 16);
  });
}

template <class Key>
cudaError_t extrema_by_tiles(const Extrema<Key>& p, cudaStream_t stream) {
  return with_tile_cells(p, [&](auto cells) {
    using Cells = decltype(cells);
    const TileShape shape = best_tile_shape<Cells>(p);
    return cuda::launch(tiles_kernel<Cells>, shape.blocks, shape.threads, shape.shared_bytes, stream, p, shape);
  });
}

}  // namespace pyperf::sliding_window
