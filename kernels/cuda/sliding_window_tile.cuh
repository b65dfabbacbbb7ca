// Tiles of a dense row: a block reads a range of padded positions into shared memory as ordered keys, and writes a
// range of outputs from there.
#pragma once

#include <cstring>

#include "sliding_window_cells.cuh"

namespace pyperf::sliding_window {

// Dense outputs are those of stride 1; output i of the problem is dense output i * stride.
PYPERF_HD int64_t dense_outputs(const Windows& w) { return w.out_length ? (w.out_length - 1) * w.stride + 1 : 0; }

// Words that a load of `count` may touch: the first and the last granule can be partial.
template <class Cells>
PYPERF_HD int padded_words(int64_t count) {
  return int((count + 2 * Cells::kGranule - 2) / Cells::kGranule * Cells::kGranule);
}

template <class Key>
bool dense_rows(const Extrema<Key>& p) {
  return p.lanes == 1 && p.x_stride == 1 && (p.windows.dilation == 1 || p.windows.window == 1);
}

template <class Key>
struct RowSource {
  const Key* x;  // the row's first element
  const Windows& windows;
  const OrderedKey<Key>& key;

  PYPERF_DEVICE Key at(int64_t position) const {
    const int64_t source = windows.source(position);
    return source < 0 ? OrderedKey<Key>::kLowest : key.encode(x[source]);
  }
  PYPERF_DEVICE bool inside(int64_t begin, int64_t end) const { return begin >= 0 && end <= windows.length; }
};

template <class Cells>
PYPERF_DEVICE void load_granule(const typename Cells::Key* from, typename Cells::Key (&bits)[Cells::kGranule]) {
  if constexpr (sizeof bits == 16) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    memcpy(bits, &raw, sizeof bits);
  } else {
    const uint64_t raw = *reinterpret_cast<const uint64_t*>(from);
    memcpy(bits, &raw, sizeof bits);
  }
}

template <class Cells>
PYPERF_DEVICE void store_granule(typename Cells::Word* to, const typename Cells::Word (&words)[Cells::kGranule]) {
  constexpr int kVectors = int(sizeof words / 16);
  uint4 vectors[kVectors];
  memcpy(vectors, words, sizeof words);
#pragma unroll
  for (int j = 0; j < kVectors; ++j) reinterpret_cast<uint4*>(to)[j] = vectors[j];
}

// kInside: no position lies outside the row, so that several loads can be in flight.
template <class Cells, bool kInside>
PYPERF_DEVICE void load_granules(const RowSource<typename Cells::Key>& row, int64_t begin, int granules,
                                 int half_distance, typename Cells::Word* words) {
  using Key = typename Cells::Key;
  constexpr int kGranule = Cells::kGranule;
  [[maybe_unused]] constexpr int kUnroll = kInside ? 4 : 1;
  const int64_t second = (Cells::kHalves - 1) * int64_t(half_distance);
#pragma unroll kUnroll
  for (int g = int(threadIdx.x); g < granules; g += int(blockDim.x)) {
    const int64_t position = begin + int64_t(g) * kGranule;
    if (kInside ||
        (row.inside(position, position + kGranule) && row.inside(position + second, position + second + kGranule))) {
      Key low[kGranule], high[kGranule];
      load_granule<Cells>(row.x + position, low);
      if constexpr (Cells::kHalves == 2)
        load_granule<Cells>(row.x + position + second, high);
      else
        memcpy(high, low, sizeof high);
      typename Cells::Word made[kGranule];
#pragma unroll
      for (int j = 0; j < kGranule; ++j) made[j] = Cells::encode(row.key, low[j], high[j]);
      store_granule<Cells>(words + g * kGranule, made);
    } else {
#pragma unroll 1
      for (int j = 0; j < kGranule; ++j)
        words[g * kGranule + j] = Cells::word(row.at(position + j), row.at(position + second + j));
    }
  }
}

// Reads the positions [begin, begin + count), and those `half_distance` further where words hold two; returns the
// word of `begin` (loads start on whole granules). The caller puts a barrier behind it.
template <class Cells>
PYPERF_DEVICE const typename Cells::Word* load_words(const RowSource<typename Cells::Key>& row, int64_t begin,
                                                     int count, int half_distance, typename Cells::Word* words) {
  constexpr int kGranule = Cells::kGranule;
  const uint64_t address = reinterpret_cast<uintptr_t>(row.x) / sizeof(typename Cells::Key) + uint64_t(begin);
  const int skipped = int(address % kGranule);
  const int granules = (skipped + count + kGranule - 1) / kGranule;
  const int64_t end = begin - skipped + int64_t(granules) * kGranule + (Cells::kHalves - 1) * half_distance;
  if (row.inside(begin - skipped, end))
    load_granules<Cells, true>(row, begin - skipped, granules, half_distance, words);
  else
    load_granules<Cells, false>(row, begin - skipped, granules, half_distance, words);
  return words + skipped;
}

// The cells of a chunk whose first word stands for `position`.
template <class Cells>
PYPERF_DEVICE void load_chunk(const typename Cells::Word* words, uint32_t position, bool last,
                              typename Cells::Cell (&cells)[Cells::kChunk]) {
#pragma unroll
  for (int v = 0; v < Cells::kChunk; ++v) cells[v] = Cells::cell(words[v], position + uint32_t(v), last);
}

template <class Cell, int kCount>
PYPERF_DEVICE Cell maximum(const Cell (&cells)[kCount]) {
  Cell parts[3] = {cells[0], cells[1], cells[2]};
#pragma unroll
  for (int v = 3; v < kCount; ++v) parts[v % 3] = larger(parts[v % 3], cells[v]);
  return larger(larger(parts[0], parts[1]), parts[2]);
}

// cells[v] becomes the maximum of the cells from v on, and of `behind`.
template <class Cell, int kCount>
PYPERF_DEVICE void suffix_maxima(Cell (&cells)[kCount], Cell behind) {
#pragma unroll
  for (int v = kCount - 1; v >= 0; --v) cells[v] = behind = larger(cells[v], behind);
}

// Takes in the maximum of `before` and the leading cells up to v.
template <class Cell, int kCount>
PYPERF_DEVICE void add_prefix_maxima(Cell (&cells)[kCount], const Cell (&leading)[kCount], Cell before) {
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    before = larger(before, leading[v]);
    cells[v] = larger(cells[v], before);
  }
}

// Where a tile's outputs go.
template <class Key>
struct TileOutput {
  const Windows& windows;
  const OrderedKey<Key>& key;
  Key* y;         // the row's first output
  void* offsets;  // of the problem, `offsets_row` elements before the row's first one
  int64_t offsets_row;
  OffsetType offset;
  bool last;
  int32_t first_tap;
  int64_t y_stride;
  int64_t first;  // dense output of the tile's first cell
  int64_t dense;  // dense outputs of the row

  PYPERF_DEVICE bool contiguous() const { return windows.stride == 1 && y_stride == 1; }
};

// The tile starts where y has a 128-byte line.
template <class Key>
PYPERF_DEVICE int line_shift(const Key* y, const Windows& w, int64_t y_stride) {
  constexpr int kLine = 128 / int(sizeof(Key));
  return w.stride == 1 && y_stride == 1 ? int(reinterpret_cast<uintptr_t>(y) / sizeof(Key) % kLine) : 0;
}

// Calls write(cell, output) for the outputs of the tile, neighbouring threads on neighbouring outputs.
template <class Write>
PYPERF_DEVICE void for_each_output(const Windows& w, int64_t first, int64_t dense, int count, Write write) {
  const int64_t begin = first < 0 ? 0 : first;
  const int64_t end = first + count < dense ? first + count : dense;
  for (int64_t i = (begin + w.stride - 1) / w.stride + threadIdx.x; i * w.stride < end; i += blockDim.x)
    write(int(i * w.stride - first), i);
}

template <class Key>
PYPERF_DEVICE void copy_values(const TileOutput<Key>& out, const Key* staged, int count) {
  constexpr int kGranule = 16 / int(sizeof(Key));
  Key* y = out.y + out.first;
  if (!out.contiguous() || reinterpret_cast<uintptr_t>(y) % 16) {
    for_each_output(out.windows, out.first, out.dense, count,
                    [&](int cell, int64_t i) { out.y[i * out.y_stride] = staged[cell]; });
    return;
  }
  for (int e = int(threadIdx.x) * kGranule; e < count; e += int(blockDim.x) * kGranule) {
    if (out.first + e >= 0 && out.first + e + kGranule <= out.dense) {
      *reinterpret_cast<uint4*>(y + e) = *reinterpret_cast<const uint4*>(staged + e);
    } else {
      for (int j = e; j < e + kGranule; ++j)
        if (out.first + j >= 0 && out.first + j < out.dense) y[j] = staged[j];
    }
  }
}

PYPERF_DEVICE void store_four_taps(void* offsets, OffsetType type, int64_t index, const int32_t (&taps)[4]) {
  if (type == OffsetType::u8) {
    uint32_t packed = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) packed |= uint32_t(uint8_t(taps[j])) << 8 * j;
    *reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(offsets) + index) = packed;
  } else if (type == OffsetType::i16) {
    const uint64_t low = uint16_t(taps[0]) | uint32_t(uint16_t(taps[1])) << 16;
    const uint64_t high = uint16_t(taps[2]) | uint32_t(uint16_t(taps[3])) << 16;
    *reinterpret_cast<uint64_t*>(static_cast<int16_t*>(offsets) + index) = high << 32 | low;
  } else {
    *reinterpret_cast<uint4*>(static_cast<int32_t*>(offsets) + index) =
        uint4{uint32_t(taps[0]), uint32_t(taps[1]), uint32_t(taps[2]), uint32_t(taps[3])};
  }
}

template <class Key>
PYPERF_DEVICE void copy_taps(const TileOutput<Key>& out, const int32_t* staged, int count) {
  const int64_t address = reinterpret_cast<uintptr_t>(out.offsets) / int(out.offset) + out.offsets_row + out.first;
  if (!out.contiguous() || address % 4) {
    for_each_output(out.windows, out.first, out.dense, count, [&](int cell, int64_t i) {
      store_tap(out.offsets, out.offset, out.offsets_row + i * out.y_stride, staged[cell]);
    });
    return;
  }
  for (int e = int(threadIdx.x) * 4; e < count; e += int(blockDim.x) * 4) {
    if (out.first + e >= 0 && out.first + e + 4 <= out.dense) {
      const uint4 four = *reinterpret_cast<const uint4*>(staged + e);
      const int32_t taps[4] = {int32_t(four.x), int32_t(four.y), int32_t(four.z), int32_t(four.w)};
      store_four_taps(out.offsets, out.offset, out.offsets_row + out.first + e, taps);
    } else {
      for (int j = e; j < e + 4; ++j)
        if (out.first + j >= 0 && out.first + j < out.dense)
          store_tap(out.offsets, out.offset, out.offsets_row + out.first + j, staged[j]);
    }
  }
}

// Writes a block's cells, those of thread t starting at position t * kChunk of the tile. `staging` holds a tile's bits
// and may be the words that the cells were made from; `taps` holds one int32 an output.
template <class Cells>
PYPERF_DEVICE void write_tile(const TileOutput<typename Cells::Key>& out,
                              const typename Cells::Cell (&cells)[Cells::kChunk], void* staging, int32_t* taps) {
  using Key = typename Cells::Key;
  constexpr int kChunk = Cells::kChunk;
  const int words = int(blockDim.x) * kChunk;
  Key* staged = static_cast<Key*>(staging);
  __syncthreads();
#pragma unroll
  for (int v = 0; v < kChunk; ++v) {
    const int e = int(threadIdx.x) * kChunk + v;
#pragma unroll
    for (int half = 0; half < Cells::kHalves; ++half) {
      const Key key = Cells::key(Cells::half(cells[v], half));
      staged[half * words + e] = out.key.decode(key);
      if constexpr (Cells::kWinners) {
        const uint32_t position = Cells::position(cells[v], out.last);
        const int64_t start = out.first + e - out.windows.left;
        const int32_t tap = key == OrderedKey<Key>::kLowest
                                ? int32_t(lowest_tap(out.windows, start, out.last, is_floating(out.key)))
                                : int32_t(position - uint32_t(e));
        taps[e] = tap < 0 ? -1 : tap + out.first_tap;
      }
    }
  }
  __syncthreads();
  copy_values(out, staged, words * Cells::kHalves);
  if constexpr (Cells::kWinners) copy_taps(out, taps, words);
  __syncthreads();
}

}  // namespace pyperf::sliding_window
