// Cells: what the sliding-window kernels compare. A cell is an ordered key, or a key together with the rank of its
// position, so that one maximum also settles ties.
#pragma once

#include <type_traits>

#include "../math/sliding_window.h"
#include "common.cuh"

namespace pyperf::sliding_window {

// Ranks order equal keys: the larger one wins. Its own inverse.
PYPERF_DEVICE uint32_t rank(uint32_t position, bool last) { return last ? position : ~position; }

template <class Key>
struct Winner {
  Key key;
  uint32_t rank;
};

template <class Cell>
PYPERF_DEVICE Cell larger(Cell a, Cell b) {
  return b > a ? b : a;
}
template <class Key>
PYPERF_DEVICE Winner<Key> larger(Winner<Key> a, Winner<Key> b) {
  return b.key > a.key || (b.key == a.key && b.rank > a.rank) ? b : a;
}

template <class Cell>
PYPERF_DEVICE Cell shuffle_up(Cell cell, int delta, int width = 32) {
  if constexpr (sizeof(Cell) < 4)
    return Cell(__shfl_up_sync(cuda::kWholeWarp, int32_t(cell), delta, width));
  else if constexpr (sizeof(Cell) == 4)
    return __shfl_up_sync(cuda::kWholeWarp, cell, delta, width);
  else
    return Cell(__shfl_up_sync(cuda::kWholeWarp, (long long)(cell), delta, width));
}
template <class Cell>
PYPERF_DEVICE Cell shuffle_down(Cell cell, int delta, int width = 32) {
  if constexpr (sizeof(Cell) < 4)
    return Cell(__shfl_down_sync(cuda::kWholeWarp, int32_t(cell), delta, width));
  else if constexpr (sizeof(Cell) == 4)
    return __shfl_down_sync(cuda::kWholeWarp, cell, delta, width);
  else
    return Cell(__shfl_down_sync(cuda::kWholeWarp, (long long)(cell), delta, width));
}
template <class Key>
PYPERF_DEVICE Winner<Key> shuffle_up(Winner<Key> cell, int delta, int width = 32) {
  return {shuffle_up(cell.key, delta, width), shuffle_up(cell.rank, delta, width)};
}
template <class Key>
PYPERF_DEVICE Winner<Key> shuffle_down(Winner<Key> cell, int delta, int width = 32) {
  return {shuffle_down(cell.key, delta, width), shuffle_down(cell.rank, delta, width)};
}

// Integers have no bit pattern for "no element": a real element may share the key of padding.
template <class Key>
PYPERF_DEVICE bool is_floating(const OrderedKey<Key>& key) {
  return key.infinity != OrderedKey<Key>::kHighest;
}

// The winning tap where the window's highest key is the lowest one there is, -1 for "none": floats then hold nothing,
// integers hold equal elements wherever a tap reads one.
PYPERF_DEVICE int64_t lowest_tap(const Windows& w, int64_t start, bool last, bool floating) {
  if (floating || w.length == 0) return -1;
  if (w.edge != Edge::constant) return last ? w.window - 1 : 0;
  const int64_t low = start >= 0 ? 0 : cuda::divide(-start + w.dilation - 1, w.dilation).quotient;
  const int64_t room = w.length - 1 - start;
  int64_t high = room < 0 ? -1 : cuda::divide(room, w.dilation).quotient;
  if (high > w.window - 1) high = w.window - 1;
  return low > high ? -1 : last ? high : low;
}

PYPERF_DEVICE int64_t load_tap(const void* offsets, OffsetType type, int64_t index) {
  if (type == OffsetType::u8) {
    const uint8_t tap = static_cast<const uint8_t*>(offsets)[index];
    return tap == 255 ? -1 : int64_t(tap);
  }
  return type == OffsetType::i16 ? int64_t(static_cast<const int16_t*>(offsets)[index])
                                 : int64_t(static_cast<const int32_t*>(offsets)[index]);
}

// Positions that a winner can have; whatever else saved offsets may say counts as no winner.
struct WinnerRange {
  int64_t low, high;

  PYPERF_DEVICE explicit WinnerRange(const Windows& w)
      : low(w.edge == Edge::constant ? 0 : -w.left),
        high(w.edge == Edge::constant ? w.length : w.padded_length() - w.left) {}
  PYPERF_DEVICE bool holds(int64_t position) const { return position >= low && position < high; }
};

PYPERF_DEVICE void store_tap(void* offsets, OffsetType type, int64_t index, int64_t tap) {
  if (type == OffsetType::u8)
    static_cast<uint8_t*>(offsets)[index] = uint8_t(tap);
  else if (type == OffsetType::i16)
    static_cast<int16_t*>(offsets)[index] = int16_t(tap);
  else
    static_cast<int32_t*>(offsets)[index] = int32_t(tap);
}

// ---- cells of a tile: what a block keeps in shared memory (words) and in registers (cells) ----
//
// kGranule elements are read at once. kHalves == 2: a word holds the keys of the elements e and e + (words of a tile),
// so that one instruction works on two tiles side by side. Single is the cell of one of the two.

// Two 16-bit keys in one word.
struct KeyPair {
  uint32_t keys;
};
PYPERF_DEVICE KeyPair larger(KeyPair a, KeyPair b) { return {__vmaxs2(a.keys, b.keys)}; }
PYPERF_DEVICE KeyPair shuffle_up(KeyPair cell, int delta, int width = 32) {
  return {shuffle_up(cell.keys, delta, width)};
}
PYPERF_DEVICE KeyPair shuffle_down(KeyPair cell, int delta, int width = 32) {
  return {shuffle_down(cell.keys, delta, width)};
}

// Values of 32 and 64 bits.
template <class K>
struct PlainCells {
  using Key = K;
  using Word = K;
  using Cell = K;
  using Single = K;
  static constexpr int kHalves = 1;
  static constexpr int kChunk = sizeof(K) == 4 ? 17 : 9;
  static constexpr int kGranule = 16 / int(sizeof(K));
  static constexpr int kMaxThreads = sizeof(K) == 4 ? 256 : 512;
  static constexpr int kMinBlocks = sizeof(K) == 4 ? 4 : 2;
  static constexpr bool kWinners = false;

  PYPERF_DEVICE static Word word(Key low, Key) { return low; }
  PYPERF_DEVICE static Word encode(const OrderedKey<Key>& key, Key low, Key) { return word(key.encode(low), 0); }
  PYPERF_DEVICE static Cell cell(Word word, uint32_t, bool) { return word; }
  PYPERF_DEVICE static Single half(Cell cell, int) { return cell; }
  PYPERF_DEVICE static Cell join(Single low, Single) { return low; }
  PYPERF_DEVICE static Single lowest() { return OrderedKey<K>::kLowest; }
  PYPERF_DEVICE static Single moved(Single cell, uint32_t, bool) { return cell; }
  PYPERF_DEVICE static Key key(Single cell) { return cell; }
};

// OrderedKey::encode on both halves at once.
PYPERF_DEVICE uint32_t encode_pair(const OrderedKey<int16_t>& key, uint32_t bits) {
  auto twice = [](int16_t value) { return uint32_t(uint16_t(value)) * 0x10001u; };
  auto spread = [](uint32_t word) { return (word >> 15 & 0x10001u) * 0xffffu; };  // the top bit of a half to all of it
  const uint32_t b = bits ^ twice(key.pre);
  const uint32_t ordered = b ^ (spread(b) & twice(key.float_mask));
  const uint32_t nan = spread((b & 0x7fff7fffu) + twice(int16_t(0x7fff - key.infinity)));  // no half carries over
  return (ordered & ~nan) | (twice(key.nan) & nan);
}

// Values of 8 and 16 bits.
template <class K>
struct PairedCells {
  using Key = K;
  using Word = uint32_t;
  using Cell = KeyPair;
  using Single = int32_t;
  static constexpr int kHalves = 2;
  static constexpr int kChunk = 17;
  static constexpr int kGranule = 8;
  static constexpr int kMaxThreads = 256;
  static constexpr int kMinBlocks = 4;
  static constexpr bool kWinners = false;

  PYPERF_DEVICE static Word word(Key low, Key high) { return (uint32_t(high) << 16) | (uint32_t(low) & 0xffffu); }
  PYPERF_DEVICE static Word encode(const OrderedKey<Key>& key, Key low, Key high) {
    if constexpr (sizeof(Key) == 2)
      return encode_pair(key, word(low, high));
    else
      return word(key.encode(low), key.encode(high));
  }
  PYPERF_DEVICE static Cell cell(Word word, uint32_t, bool) { return {word}; }
  PYPERF_DEVICE static Single half(Cell cell, int n) { return int16_t(n ? cell.keys >> 16 : cell.keys); }
  PYPERF_DEVICE static Cell join(Single low, Single high) { return {word(Key(low), Key(high))}; }
  PYPERF_DEVICE static Single lowest() { return OrderedKey<K>::kLowest; }
  PYPERF_DEVICE static Single moved(Single cell, uint32_t, bool) { return cell; }
  PYPERF_DEVICE static Key key(Single cell) { return Key(cell); }
};

// Winners of 8 and 16 bits among fewer than 2^16 positions: key and rank in one 32-bit integer.
template <class K>
struct NarrowWinnerCells {
  using Key = K;
  using Word = int32_t;
  using Cell = int32_t;
  using Single = int32_t;
  static constexpr int kHalves = 1;
  static constexpr int kChunk = 17;
  static constexpr int kGranule = 8;
  static constexpr int kMaxThreads = 256;
  static constexpr int kMinBlocks = 4;
  static constexpr bool kWinners = true;

  PYPERF_DEVICE static Word word(Key low, Key) { return int32_t(uint32_t(int32_t(low)) << 16); }
  PYPERF_DEVICE static Word encode(const OrderedKey<Key>& key, Key low, Key) { return word(key.encode(low), 0); }
  PYPERF_DEVICE static Cell cell(Word word, uint32_t position, bool last) {
    return word | int32_t(rank(position, last) & 0xffffu);
  }
  PYPERF_DEVICE static Single half(Cell cell, int) { return cell; }
  PYPERF_DEVICE static Key key(Single cell) { return Key(cell >> 16); }
  PYPERF_DEVICE static uint32_t position(Single cell, bool last) { return rank(uint32_t(cell), last) & 0xffffu; }
};

// Winners of 8 to 32 bits among fewer than 2^32 positions.
template <class K>
struct WinnerCells {
  using Key = K;
  using Word = int32_t;
  using Cell = int64_t;
  using Single = int64_t;
  static constexpr int kHalves = 1;
  static constexpr int kChunk = 9;
  static constexpr int kGranule = sizeof(K) == 4 ? 4 : 8;
  static constexpr int kMaxThreads = 512;
  static constexpr int kMinBlocks = 2;
  static constexpr bool kWinners = true;

  PYPERF_DEVICE static Word word(Key low, Key) { return low; }
  PYPERF_DEVICE static Word encode(const OrderedKey<Key>& key, Key low, Key) { return word(key.encode(low), 0); }
  PYPERF_DEVICE static Cell cell(Word word, uint32_t position, bool last) {
    return int64_t(uint64_t(uint32_t(word)) << 32 | rank(position, last));
  }
  PYPERF_DEVICE static Single half(Cell cell, int) { return cell; }
  PYPERF_DEVICE static Cell join(Single low, Single) { return low; }
  PYPERF_DEVICE static Single lowest() { return cell(OrderedKey<K>::kLowest, 0, true); }
  PYPERF_DEVICE static Single moved(Single c, uint32_t distance, bool last) {
    return cell(key(c), position(c, last) + distance, last);
  }
  PYPERF_DEVICE static Key key(Single cell) { return Key(cell >> 32); }
  PYPERF_DEVICE static uint32_t position(Single cell, bool last) { return rank(uint32_t(cell), last); }
};

// Winners of 64 bits.
template <>
struct WinnerCells<int64_t> {
  using Key = int64_t;
  using Word = int64_t;
  using Cell = Winner<int64_t>;
  using Single = Cell;
  static constexpr int kHalves = 1;
  static constexpr int kChunk = 9;
  static constexpr int kGranule = 2;
  static constexpr int kMaxThreads = 512;
  static constexpr int kMinBlocks = 1;
  static constexpr bool kWinners = true;

  PYPERF_DEVICE static Word word(Key low, Key) { return low; }
  PYPERF_DEVICE static Word encode(const OrderedKey<Key>& key, Key low, Key) { return word(key.encode(low), 0); }
  PYPERF_DEVICE static Cell cell(Word word, uint32_t position, bool last) { return {word, rank(position, last)}; }
  PYPERF_DEVICE static Single half(Cell cell, int) { return cell; }
  PYPERF_DEVICE static Cell join(Single low, Single) { return low; }
  PYPERF_DEVICE static Single lowest() { return {OrderedKey<Key>::kLowest, 0}; }
  PYPERF_DEVICE static Single moved(Single c, uint32_t distance, bool last) {
    return {c.key, rank(position(c, last) + distance, last)};
  }
  PYPERF_DEVICE static Key key(Single cell) { return cell.key; }
  PYPERF_DEVICE static uint32_t position(Single cell, bool last) { return rank(cell.rank, last); }
};

}  // namespace pyperf::sliding_window
