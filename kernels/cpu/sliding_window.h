// Extrema of sliding windows on a CPU. Stamped once for each SIMD level (simd_levels.h), hence no system headers in
// here; prelude: <algorithm>, <cstdint>, <cstring>, <type_traits>, <utility>, ../math/sliding_window.h.
//
//   short windows    one load and one store a vector: the maxima of 2^n neighbours stay in registers, and a window is
//                    the union of those that end at its last element, a vector before, ... and one that starts where
//                    it starts. Where the machine cannot shift by a number that is known at run time, neighbours are
//                    loaded again from a tile in the L1 cache.
//   above            van Herk-Gil-Werman over vectors whose lanes are independent: a vector holds maxima of kLanes
//                    neighbours, and overlap is free because a maximum is idempotent
//   huge windows     the same with blocks that stay in the cache; what lies between the first and the last block of a
//                    window comes from the maxima of whole blocks
// Nothing here branches on the data.
#include "sliding_window_vectors.h"
//
#include "sliding_window_sequence.h"

// ---- short windows ----

// A window is the union of kWhole + 1 maxima of 2^kSteps neighbours, a vector apart, and of one more that starts with
// it.
template <int kSteps, int kWhole, class Key, class E>
void short_windows(const Rows<Key, E>& rows) {
  using V = Vector<E>;
  constexpr int64_t L = V::kLanes;
  const int64_t before = (rows.sequence.windows.window - (int64_t(1) << kSteps)) % L;
  const Neighbours<E> first(L - before);
  typename Rows<Key, E>::Scratch scratch;
  typename Rows<Key, E>::template Ending<kSteps> ending(rows, -1 - kWhole, scratch);
  const typename Rows<Key, E>::Results results(rows, scratch);
  V recent[kWhole + 2] = {};
  const auto run = [&](int64_t begin, int64_t end, auto direct) __attribute__((always_inline)) {
    for (int64_t k = begin; k < end; ++k) {
      for (int i = kWhole + 1; i > 0; --i) recent[i] = recent[i - 1];
      V e = recent[0] = ending(k, direct);
      for (int i = 1; i <= kWhole; ++i) e = maximum(e, recent[i]);
      if (k >= 0) results(maximum(e, V{{first(recent[kWhole + 1].v[0], recent[kWhole].v[0])}}), k, direct);
    }
  };
  const int64_t vectors = rows.vectors();
  int64_t from = 0, to = vectors;  // direct ones
  while (from < vectors && !(ending.direct(from, 1) && results.direct(from, 1))) ++from;
  while (to > from && !(ending.direct(to - 1, 1) && results.direct(to - 1, 1))) --to;
  for (int64_t k = -1 - kWhole; k < vectors;) {
    const bool direct = k == from && from < to;
    const int64_t end = direct ? to : k < from ? from : vectors;
    if (direct)
      run(k, end, Direct());
    else
      run(k, end, Anyhow());
    k = end;
  }
  results.finish();
}

template <int kSteps, class Key, class E>
void short_windows_from(const Rows<Key, E>& rows) {
  constexpr int64_t L = kLanes<E>;
  const int64_t window = rows.sequence.windows.window;
  if constexpr (int64_t(1) << kSteps == L) {
    const int64_t whole = (window - L) / L;
    if (whole == 0) return short_windows<kSteps, 0>(rows);
    if (whole == 1) return short_windows<kSteps, 1>(rows);
    if (whole == 2) return short_windows<kSteps, 2>(rows);
    return short_windows<kSteps, 3>(rows);
  } else {
    if (window < int64_t(2) << kSteps) return short_windows<kSteps, 0>(rows);
    return short_windows_from<kSteps + 1>(rows);
  }
}

// Without such a shift.
template <class E>
constexpr int64_t kTile = (16 << 10) / int64_t(sizeof(E));

// s[i] = max(s[i .. i + span - 1]) for i in [0, n), in place; span is a power of four and s holds n + span - 1
// elements.
template <class E>
void widen(E* s, int64_t n, int64_t span) {
  using V = Vector<E>;
  for (int64_t d = 1; 4 * d <= span; d *= 4) {
    const int64_t count = n + span - 4 * d;
    int64_t i = 0;
    for (; i + V::kLanes <= count; i += V::kLanes)
      maximum(maximum(V::load(s + i), V::load(s + i + d)), maximum(V::load(s + i + 2 * d), V::load(s + i + 3 * d)))
          .store(s + i);
    for (; i < count; ++i) s[i] = std::max(std::max(s[i], s[i + d]), std::max(s[i + 2 * d], s[i + 3 * d]));
  }
}

// out(i, max over the parts j of s[i + at[j]]) for i in [0, n)
template <int kParts, class E, class Out>
void union_of(const E* s, const int64_t (&at)[4], int64_t n, const Out& out) {
  const E *a = s + at[0], *b = s + at[1], *c = s + at[2], *d = s + at[3];
  for (int64_t i = 0; i < n; ++i) {
    E e = a[i];
    if constexpr (kParts > 1) e = std::max(e, b[i]);
    if constexpr (kParts > 2) e = std::max(e, c[i]);
    if constexpr (kParts > 3) e = std::max(e, d[i]);
    out(i, e);
  }
}

template <class Key, class E>
void short_windows_in_tiles(const Sequence<Key, E>& s, int64_t begin, int64_t end, E* memory) {
  const int64_t window = s.windows.window;
  int64_t span = 1;
  while (4 * span < window) span *= 4;
  const int64_t parts = (window + span - 1) / span;
  int64_t at[4];
  for (int64_t j = 0; j < 4; ++j) at[j] = std::min(j * span, window - span);
  const auto each = [&](int64_t n, const auto& out) {
    if (parts == 1) union_of<1>(memory, at, n, out);
    if (parts == 2) union_of<2>(memory, at, n, out);
    if (parts == 3) union_of<3>(memory, at, n, out);
    if (parts == 4) union_of<4>(memory, at, n, out);
  };
  for (int64_t k = begin; k < end; k += kTile<E>) {
    const int64_t n = std::min(kTile<E>, end - k);
    s.load(memory, k, n + window - 1);
    widen(memory, n + window - span, span);
    if (!s.kIndexed && s.dense()) {
      Key* __restrict y = s.y + k;
      const OrderedKey<Key> order = s.order;
      each(n, [=](int64_t i, E e) { y[i] = order.decode(Element<Key, E>::key(e)); });
    } else {
      E* in_place = memory;
      each(n, [=](int64_t i, E e) { in_place[i] = e; });
      s.store(memory, k, n);
    }
  }
}

template <class E>
constexpr int64_t kShort = 5 * kLanes<E>;  // windows below

// ---- windows of some vectors and more ----

#ifndef PYPERF_BLOCK_BYTES  // a test has smaller ones
#define PYPERF_BLOCK_BYTES (16 << 10)
#define PYPERF_BUFFER_BYTES (384 << 10)
#endif
template <class V>
constexpr int64_t kBlock = PYPERF_BLOCK_BYTES / int64_t(sizeof(V));  // vectors that stay in the L1 cache
template <class V>
constexpr int64_t kBuffered = PYPERF_BUFFER_BYTES / int64_t(sizeof(V));  // and in the L2 cache

// Every vector is made once. The buffer holds the last whole() vectors: those of the block before as maxima up to the
// end of that block, those of the own block as they are.
template <class E, class Source>
void van_herk(const Source& source, E* slots) {
  using V = typename Source::V;
  constexpr int64_t L = V::kLanes;
  const int64_t vectors = source.vectors(), block = source.whole();
  const typename Source::Across across(source);
  const V lowest = V::fill(Source::lowest());
  typename Source::Scratch scratch;
  typename Source::template Ending<> ending(source, -block, scratch);
  const typename Source::Results results(source, scratch);
  for (int64_t k = 0; k < block; ++k) ending(k - block, Anyhow()).store(slots + k * L);
  for (int64_t first = 0; first < vectors; first += block) {
    V rest = lowest;
    for (int64_t k = block - 1; k >= 0; --k) {
      rest = maximum(rest, V::load(slots + k * L));
      rest.store(slots + k * L);
    }
    const auto run = [&](int64_t n, auto direct) __attribute__((always_inline)) {
      V own = lowest, here = V::load(slots);
      for (int64_t k = 0; k < n; ++k) {
        const V v = ending(first + k, direct);
        own = maximum(own, v);
        if (k == 0) v.store(slots + block * L);
        const V next = V::load(slots + (k + 1) * L);
        const V before = maximum(across(here, next, slots + k * L), next);
        v.store(slots + k * L);
        here = next;
        results(maximum(own, before), first + k, direct);
      }
    };
    const int64_t n = std::min(block, vectors - first);
    if (ending.direct(first, n) && results.direct(first, n))
      run(n, Direct());
    else
      run(n, Anyhow());
  }
  results.finish();
}

// Maximum of the last `n` vectors pushed, in time that depends on neither n nor the data.
template <class V, class E>
struct RecentMaximum {
  int64_t n, count = 0;
  E* ring;    // [n, L]
  E* suffix;  // [n, L] of the last full turn
  V prefix = V::fill(0);

  static int64_t elements(int64_t n) { return 2 * n * V::kLanes; }
  RecentMaximum(int64_t n, E* memory) : n(n), ring(memory), suffix(memory + n * V::kLanes) {}

  void push(V v) {
    const int64_t at = count % n;
    v.store(ring + at * V::kLanes);
    prefix = at ? maximum(prefix, v) : v;
    if (at == n - 1) {
      V s = v;
      for (int64_t i = n - 1; i >= 0; --i) {
        s = maximum(s, V::load(ring + i * V::kLanes));
        s.store(suffix + i * V::kLanes);
      }
    }
    ++count;
  }
  // After at least n pushes.
  V get() const {
    const int64_t at = count % n;
    return at ? maximum(prefix, V::load(suffix + at * V::kLanes)) : V::load(suffix);
  }
};

template <class V, class E>
int64_t van_herk_elements(int64_t whole, int64_t reach) {
  if (whole <= kBuffered<V>) return (whole + 1) * V::kLanes;
  const int64_t block = kBlock<V>, full = (reach - block - 1) / block;
  return (block + full + 2) * V::kLanes + RecentMaximum<V, E>::elements(full);
}

// For windows of many blocks, which are read twice. Lane by lane: what starts a window up to the end of its first
// block, the whole blocks and the tail of one that lie between, and what ends it from the start of its last block on.
// Maxima of neighbours are taken once, of all that.
template <class E, class Source>
void van_herk_in_blocks(const Source& source, E* memory) {
  using V = typename Source::V;
  constexpr int64_t L = V::kLanes, kSize = kBlock<V>;
  const int64_t vectors = source.vectors(), between = source.reach() - kSize - 1;  // vectors before the last block
  const int64_t full = between / kSize, rest = between % kSize;

  E* starts = memory;                   // [kSize + 1, L]: of the vector before the block, then its own
  E* tails = starts + (kSize + 1) * L;  // [full + 1, L]: maximum of the last `rest` vectors of recent blocks
  RecentMaximum<V, E> recent(full, tails + (full + 1) * L);
  const V lowest = V::fill(Source::lowest());
  typename Source::Scratch scratch;
  typename Source::template Ending<0> ending(source, 0, scratch);
  typename Source::Starting starting(source, scratch);
  typename Source::Neighbourhood neighbourhood;
  const typename Source::Results results(source, scratch);

  int64_t seen = 0;  // blocks
  for (int64_t first = -(full + 1) * kSize; first < vectors; first += kSize) {
    const int64_t n = first < 0 ? 0 : std::min(kSize, vectors - first);  // results
    if (n > 0) {
      V start = maximum(V::load(tails + seen % (full + 1) * L), recent.get());  // the oldest tail, full + 1 blocks ago
      const auto run = [&](auto direct) __attribute__((always_inline)) {
        for (int64_t k = kSize; k >= 0; --k) {
          start = maximum(start, starting(first - 1 + k, direct));
          start.store(starts + k * L);
        }
      };
      if (Source::kDirectBlocks && starting.direct(first - 1, kSize + 1))
        run(Direct());
      else if (Source::kDirectBlocks && starting.outside(first - 1, kSize + 1))
        run(Outside());
      else
        run(Anyhow());
      neighbourhood(start);
    }
    V own = lowest, tail = lowest;
    const auto run = [&](auto direct) __attribute__((always_inline)) {
      for (int64_t k = 0; k < kSize; ++k) {
        const V v = ending(first + k, direct);
        own = maximum(own, v);
        if (k >= kSize - rest) tail = maximum(tail, v);
        if (direct || k < n) results(neighbourhood(maximum(own, V::load(starts + (k + 1) * L))), first + k, direct);
      }
    };
    const bool whole = Source::kDirectBlocks && n == kSize && results.direct(first, n);
    if (whole && ending.direct(first, n))
      run(Direct());
    else if (whole && ending.outside(first, n))
      run(Outside());
    else
      run(Anyhow());
    tail.store(tails + seen++ % (full + 1) * L);
    recent.push(own);
  }
  results.finish();
}

template <class E, class Source>
void van_herk_of(const Source& source, E* memory) {
  if (source.whole() <= kBuffered<typename Source::V>) return van_herk<E>(source, memory);
  van_herk_in_blocks<E>(source, memory);
}

// Results [begin, end) of one phase of one row; of `lanes` neighbouring rows where lanes > 0.
template <class Key, class E>
void stretch(const Sequence<Key, E>& s, int64_t begin, int64_t end, int64_t lanes, E* memory) {
  if (lanes > 0) return van_herk_of<E>(Columns<Key, E>{s, begin, end, lanes}, memory);
  const Rows<Key, E> rows{s, begin, end};
  if (s.windows.window >= kShort<E>) return van_herk_of<E>(rows, memory);
  if constexpr (Neighbours<E>::kThere)
    short_windows_from<0>(rows);
  else
    short_windows_in_tiles(s, begin, end, memory);
}

template <class Key, class E>
int64_t stretch_elements(int64_t window, bool columns) {
  if (columns) return van_herk_elements<typename Columns<Key, E>::V, E>(window, window);
  if (window < kShort<E>) return Neighbours<E>::kThere ? 0 : kTile<E> + 2 * kShort<E>;
  return van_herk_elements<Vector<E>, E>(window / kLanes<E>, (window + kLanes<E> - 1) / kLanes<E>);
}

// Work is dealt in units of kUnit results; neighbouring units that reach one thread are done as one stretch, because
// every stretch reads one window ahead of its first result.
constexpr int64_t kUnit = 4096;
constexpr int64_t kGrain = 8;          // units worth a thread of their own
constexpr int64_t kCached = 64 << 10;  // results after which the second of two outputs would read x from memory again

template <class Key, class E, class Parallel>
void extrema_of(const Extrema<Key>& p, const Parallel& parallel) {
  using Item = Element<Key, E>;
  const Windows& w = p.windows;
  const Phases phases(w);
  const bool columns = p.lanes > 1;
  constexpr int64_t kColumns = Columns<Key, E>::L;
  const int64_t lane_blocks = columns ? (p.lanes + kColumns - 1) / kColumns : 1;
  const int64_t used_phases = std::min(phases.count, w.out_length);
  const auto results = [&](int64_t phase) { return (phases.outputs(w, phase) - 1) * phases.step + 1; };
  const int64_t unit = columns ? std::max<int64_t>(kUnit / kColumns, 1) : kUnit;
  const int64_t units = (results(0) + unit - 1) / unit;
  const int64_t total = p.rows.count * lane_blocks * used_phases * units;
  const int64_t grain = kGrain * std::max<int64_t>(1, unit / (results(0) + 64));  // short rows: more of them
  const int64_t longest = std::min(Item::kPositions - w.window - 4 * kLanes<E>,
                                   p.outputs == 2 ? std::max(kCached, 4 * w.window) : INT64_MAX / 2);

  const auto run = [&](int64_t first, int64_t last, char* scratch) {
    E* memory = reinterpret_cast<E*>(scratch);
    for (int64_t t = first; t < last;) {
      const int64_t group = units == 1 ? t : t / units, from = t - group * units;
      const int64_t to = std::min(units, from + (last - t));
      t += to - from;
      int64_t phase = 0, row = group;
      if (used_phases > 1) phase = row % used_phases, row /= used_phases;
      int64_t column = 0;
      if (lane_blocks > 1) column = row % lane_blocks * kColumns, row /= lane_blocks;
      int64_t base[2];
      p.rows.offsets(row, base);
      const int64_t x_at = base[0] + column, y_at = base[1] + column;
      const int64_t lanes = columns ? std::min<int64_t>(kColumns, p.lanes - column) : 0;
      const int64_t end = std::min(to * unit, results(phase));
      for (int64_t begin = from * unit; begin < end; begin += longest) {
        for (int o = 0; o < p.outputs; ++o) {
          void* offsets = Item::kIndexed ? static_cast<char*>(p.offsets[o]) + y_at * int64_t(p.offset) : nullptr;
          const Sequence<Key, E> s{w,
                                   p.key[o],
                                   p.x + x_at,
                                   p.y[o] + y_at,
                                   offsets,
                                   p.offset,
                                   p.x_stride,
                                   p.y_stride,
                                   phase,
                                   phases.count,
                                   phases.step,
                                   p.last,
                                   p.key[o].float_mask != 0,
                                   p.first_tap,
                                   begin};
          stretch(s, begin, std::min(end, begin + longest), lanes, memory);
        }
      }
    }
  };
  parallel(total, grain, stretch_elements<Key, E>(w.window, columns) * int64_t(sizeof(E)), run);
}

template <class Key, class Parallel>
void extrema(const Extrema<Key>& p, const Parallel& parallel) {
  if (p.rows.count == 0 || p.lanes == 0 || p.windows.out_length == 0) return;
  if (p.offset == OffsetType::none) return extrema_of<Key, Key>(p, parallel);
  if constexpr (sizeof(Key) == 8) {
    extrema_of<Key, __int128>(p, parallel);
  } else if constexpr (sizeof(Key) == 4) {
    extrema_of<Key, int64_t>(p, parallel);
  } else if (p.windows.window <= Element<Key, int32_t>::kPositions / 4) {
    extrema_of<Key, int32_t>(p, parallel);
  } else {
    extrema_of<Key, int64_t>(p, parallel);
  }
}
