// Extrema of sliding windows on a CPU. Stamped once for each SIMD level (simd_levels.h), hence no includes in here;
// prelude: <algorithm>, <cstdint>, <cstring>, <type_traits>, <utility>, ../math/sliding_window.h.
//
// Elements are ordered keys, or keys packed with a position where offsets are asked for; either way one maximum
// decides.
//   short windows       maxima of 4, 16, 64 neighbours, then the union of up to four of these
//   above               van Herk-Gil-Werman over vectors whose lanes are independent: a vector holds the maxima of the
//                       kLanes-wide windows at its positions, and overlap is free because a maximum is idempotent
//   huge windows        the same with blocks of kBlock vectors; what lies between the first and the last block of a
//                       window comes from the maxima of whole blocks
// Nothing here branches on the data.

// kCount machine vectors, as the compiler's own vector type; 128-bit elements go one by one.
template <class E>
struct Machine {
  static constexpr int kLanes = PYPERF_VECTOR_BYTES / int(sizeof(E));
  typedef E Vector __attribute__((vector_size(PYPERF_VECTOR_BYTES)));
  static Vector fill(E e) { return Vector{} + e; }
};
template <>
struct Machine<__int128> {
  static constexpr int kLanes = 1;
  typedef __int128 Vector;
  static Vector fill(__int128 e) { return e; }
};

template <class E, int kCount = 1>
struct Vector {
  static constexpr int kLanes = kCount * Machine<E>::kLanes;
  typename Machine<E>::Vector v[kCount];

  // One machine vector at a time: copied as a whole, the vectors of some levels go through memory.
  PYPERF_HD static Vector load(const E* p) {
    Vector r;
    for (int i = 0; i < kCount; ++i) memcpy(&r.v[i], p + i * Machine<E>::kLanes, sizeof r.v[i]);
    return r;
  }
  PYPERF_HD void store(E* p) const {
    for (int i = 0; i < kCount; ++i) memcpy(p + i * Machine<E>::kLanes, &v[i], sizeof v[i]);
  }
  PYPERF_HD static Vector fill(E e) {
    Vector r;
    for (int i = 0; i < kCount; ++i) r.v[i] = Machine<E>::fill(e);
    return r;
  }
};
template <class E, int kCount>
PYPERF_HD Vector<E, kCount> maximum(const Vector<E, kCount>& a, const Vector<E, kCount>& b) {
  Vector<E, kCount> r;
  for (int i = 0; i < kCount; ++i) r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return r;
}

// A key alone (E == Key), or a key in the high bits of E above its position in tie order. The low bits are 0 exactly
// where there is no element: padding, and NaN where it is ignored.
template <class Key, class E>
struct Element {
  static constexpr bool kIndexed = sizeof(E) > sizeof(Key);
  static constexpr int kShift = 8 * int(sizeof(E) - sizeof(Key));
  using Low =
      std::conditional_t<(sizeof(E) <= 4), uint32_t, std::conditional_t<sizeof(E) == 8, uint64_t, unsigned __int128>>;
  static constexpr Low kLowMask = kIndexed ? Low(Low(1) << kShift) - 1 : 0;

  static E nothing() { return E(E(OrderedKey<Key>::kLowest) * E(E(1) << kShift)); }
  static E make(Key key, int64_t position, bool last, bool lowest_is_nothing) {
    if constexpr (!kIndexed) return key;
    const Low tie = last ? Low(position) + 1 : kLowMask - Low(position);
    const Low low = lowest_is_nothing && key == OrderedKey<Key>::kLowest ? Low(0) : tie;
    return E(Low(Low(key) << kShift) | low);
  }
  static Key key(E e) { return Key(e >> kShift); }
  static int64_t position(E e, bool last) {  // -1: nothing
    const Low low = Low(e) & kLowMask;
    return low == 0 ? int64_t(-1) : int64_t(last ? low - 1 : kLowMask - low);
  }
  // Positions are counted from the start of a stretch; this many of them fit.
  static constexpr int64_t kPositions = kIndexed && kShift < 62 ? (int64_t(1) << kShift) - 2 : INT64_MAX;
};

template <class E>
constexpr int kLanes = Vector<E>::kLanes;
template <class V, class E>
constexpr int64_t kBlock = (16 << 10) / (V::kLanes * int64_t(sizeof(E)));  // vectors; two blocks stay in the L1 cache

// s[i] = max(s[i .. i + span - 1]) for i in [0, n), in place; span is a power of two and s holds n + span - 1 elements,
// or, from done > 1 on, n + span - done maxima of `done` elements.
template <class E>
void widen(E* s, int64_t n, int64_t span, int64_t done = 1) {
  using V = Vector<E>;
  int64_t d = done;
  for (; 4 * d <= span; d *= 4) {
    const int64_t count = n + span - 4 * d;
    int64_t i = 0;
    for (; i + V::kLanes <= count; i += V::kLanes)
      maximum(maximum(V::load(s + i), V::load(s + i + d)), maximum(V::load(s + i + 2 * d), V::load(s + i + 3 * d)))
          .store(s + i);
    for (; i < count; ++i) s[i] = std::max(std::max(s[i], s[i + d]), std::max(s[i + 2 * d], s[i + 3 * d]));
  }
  if (2 * d <= span) {
    int64_t i = 0;
    for (; i + V::kLanes <= n; i += V::kLanes) maximum(V::load(s + i), V::load(s + i + d)).store(s + i);
    for (; i < n; ++i) s[i] = std::max(s[i], s[i + d]);
  }
}

// Maxima of kLanes elements in registers: the vectors come from the end of the row to its start, and each step looks
// into the vector after this one. For 512-bit vectors of 4- and 8-byte keys, where a shift across two vectors is one
// instruction; elsewhere neighbours are cheaper to load again.
template <class Key>
struct Doubling {
  static constexpr int L = kLanes<Key>;
  static constexpr int kSteps = L == 8 ? 3 : 4;
  using V = typename Machine<Key>::Vector;
  V after[kSteps];  // of the vector behind: its elements, maxima of 2, of 4, of 8

  template <int kShift, size_t... kLane>
  static V shifted(V low, V high, std::index_sequence<kLane...>) {
    return __builtin_shufflevector(low, high, int(kLane + kShift)...);
  }
  template <int kStep>
  V from(V v) {
    if constexpr (kStep == kSteps) {
      return v;
    } else {
      const V behind = shifted<1 << kStep>(v, after[kStep], std::make_index_sequence<L>());
      after[kStep] = v;
      return from<kStep + 1>(v > behind ? v : behind);
    }
  }
};

template <class Key>
typename Machine<Key>::Vector encoded(const OrderedKey<Key>& k, const Key* from) {
  typename Machine<Key>::Vector bits;
  memcpy(&bits, from, sizeof bits);
  bits ^= k.pre;
  const auto key = bits ^ ((bits >> OrderedKey<Key>::kSignShift) & k.float_mask);
  return (bits & OrderedKey<Key>::kHighest) > k.infinity ? Machine<Key>::fill(k.nan) : key;
}

// The k-th dense window of a phase starts at element k of this sequence; Phases says which of them are outputs.
// Positions are counted from `origin`.
template <class Key, class E>
struct Sequence {
  using Item = Element<Key, E>;
  static constexpr bool kIndexed = Item::kIndexed;

  Windows windows;
  OrderedKey<Key> order;
  const Key* x;
  Key* y;
  void* offsets;
  OffsetType offset;
  int64_t x_stride, y_stride;
  int64_t phase, phases, step;
  bool last, floating;
  int64_t first_tap;
  int64_t origin;

  int64_t position(int64_t j) const { return windows.start(phase) + j * windows.dilation; }

  // out[i] = element j + i; x may be read at every in-range position.
  void load(E* out, int64_t j, int64_t n) const {
    const auto clip = [&](int64_t limit) {  // first element at or after position `limit`
      const int64_t distance = limit - position(j);
      const int64_t steps = windows.dilation == 1 ? distance : (distance + windows.dilation - 1) / windows.dilation;
      return std::clamp<int64_t>(steps, 0, n);
    };
    const int64_t inside = position(j) >= 0 ? 0 : clip(0);
    const int64_t beyond = position(j) >= windows.length ? 0 : clip(windows.length);
    edge(out, j, 0, std::min(inside, beyond));
    const Key* from = x + position(j + inside) * x_stride;
    const int64_t by = windows.dilation * x_stride;
    const OrderedKey<Key> k = order;
    const bool last_wins = last, lowest_is_nothing = floating;
    const int64_t at = j - origin;
    if (by == 1)
      for (int64_t i = inside; i < beyond; ++i)
        out[i] = Item::make(k.encode(from[i - inside]), at + i, last_wins, lowest_is_nothing);
    else
      for (int64_t i = inside; i < beyond; ++i)
        out[i] = Item::make(k.encode(from[(i - inside) * by]), at + i, last_wins, lowest_is_nothing);
    edge(out, j, std::max(inside, beyond), n);
  }

  // out[i] = max(element j + i, ..., element j + i + kLanes - 1) for i in [0, n).
  void load_maxima(E* out, int64_t j, int64_t n) const {
    constexpr int L = kLanes<E>;
    if constexpr (!kIndexed && sizeof(E) >= 4 && PYPERF_VECTOR_BYTES == 64) {
      const int64_t first = position(j), vectors = (n + L - 1) / L;
      if (windows.dilation * x_stride == 1 && first >= 0 && first + (vectors + 1) * L <= windows.length) {
        const Key* from = x + first;
        Doubling<Key> doubling;
        for (auto& v : doubling.after) v = Machine<Key>::fill(OrderedKey<Key>::kLowest);
        doubling.template from<0>(encoded(order, from + vectors * L));
        for (int64_t k = vectors - 1; k >= 0; --k) {
          const auto maxima = doubling.template from<0>(encoded(order, from + k * L));
          memcpy(out + k * L, &maxima, sizeof maxima);
        }
        return;
      }
    }
    load(out, j, n + L - 1);
    widen(out, n, L);
  }

  void edge(E* out, int64_t j, int64_t from, int64_t to) const {
    if (windows.edge == Edge::constant) {
      if (from < to) std::fill(out + from, out + to, Item::nothing());
      return;
    }
    for (int64_t i = from; i < to; ++i) {
      const int64_t source = windows.source(position(j + i));
      out[i] =
          source < 0 ? Item::nothing() : Item::make(order.encode(x[source * x_stride]), j - origin + i, last, floating);
    }
  }

  // Results k .. k + n - 1.
  void store(const E* in, int64_t k, int64_t n) const {
    if (dense()) {
      Key* to = y + k;
      const OrderedKey<Key> o = order;
      for (int64_t i = 0; i < n; ++i) to[i] = o.decode(Item::key(in[i]));
    } else {
      for (int64_t i = skip(k); i < n; i += step) y[output(k + i) * y_stride] = order.decode(Item::key(in[i]));
    }
    if constexpr (Item::kIndexed) {
      if (offset == OffsetType::u8) store_offsets(static_cast<uint8_t*>(offsets), in, k, n);
      if (offset == OffsetType::i16) store_offsets(static_cast<int16_t*>(offsets), in, k, n);
      if (offset == OffsetType::i32) store_offsets(static_cast<int32_t*>(offsets), in, k, n);
    }
  }

  template <class Offset>
  void store_offsets(Offset* to, const E* in, int64_t k, int64_t n) const {
    const bool last_wins = last;
    const int64_t at = k - origin - first_tap;
    const auto tap = [at, last_wins](E e, int64_t i) {
      const int64_t position = Item::position(e, last_wins);
      return position < 0 ? Offset(-1) : Offset(position - at - i);
    };
    if (dense()) {
      to += k;
      for (int64_t i = 0; i < n; ++i) to[i] = tap(in[i], i);
    } else {
      for (int64_t i = skip(k); i < n; i += step) to[output(k + i) * y_stride] = tap(in[i], i);
    }
  }

  bool dense() const { return phases == 1 && step == 1 && y_stride == 1; }
  int64_t skip(int64_t k) const { return step == 1 ? 0 : (step - k % step) % step; }
  int64_t output(int64_t k) const { return phase + k / step * phases; }
};

// Vectors of the van Herk recursion along a row: lane l of vector k covers the elements kL + l ... kL + l + L - 1.
template <class Key, class E>
struct RowVectors {
  using V = Vector<E>;
  static constexpr int64_t L = V::kLanes;
  const Sequence<Key, E>& sequence;
  int64_t begin, end;  // results wanted; vector 0 starts at `begin`

  static E lowest() { return Element<Key, E>::nothing(); }
  int64_t window() const { return sequence.windows.window; }
  int64_t vectors() const { return (end - begin + L - 1) / L; }
  int64_t whole() const { return window() / L; }
  int64_t reach() const { return (window() + L - 1) / L; }

  void fill(E* out, int64_t j, int64_t n) const { sequence.load_maxima(out, j, n * L); }
  void trailing(E* out, int64_t k, int64_t n) const { fill(out, begin + k * L, n); }
  void leading(E* out, int64_t k, int64_t n) const { fill(out, begin + k * L + window() - L, n); }
  void store(const E* in, int64_t k, int64_t n) const {
    const int64_t from = begin + k * L;
    sequence.store(in, from, std::min(n * L, end - from));
  }
};

// The same along a dimension that is not the dense one: a vector holds one element of each of L neighbouring rows, and
// takes whole cache lines with it.
template <class Key, class E>
struct ColumnVectors {
  using V = Vector<E, 4>;
  static constexpr int64_t L = V::kLanes;
  const Sequence<Key, E>& sequence;
  int64_t begin, end;
  int64_t lanes;  // <= L

  static E lowest() { return Element<Key, E>::nothing(); }
  int64_t window() const { return sequence.windows.window; }
  int64_t vectors() const { return end - begin; }
  int64_t whole() const { return window(); }
  int64_t reach() const { return window(); }

  void fill(E* out, int64_t j, int64_t n) const {
    using Item = Element<Key, E>;
    const Sequence<Key, E>& s = sequence;
    const OrderedKey<Key> order = s.order;
    const bool last = s.last, floating = s.floating;
    for (int64_t i = 0; i < n; ++i, out += L) {
      const int64_t source = s.windows.source(s.position(j + i));
      const int64_t filled = source < 0 ? 0 : lanes;
      const Key* from = s.x + std::max<int64_t>(source, 0) * s.x_stride;
      const int64_t at = j + i - s.origin;
      if (filled == L)
        for (int64_t l = 0; l < L; ++l) out[l] = Item::make(order.encode(from[l]), at, last, floating);
      else
        for (int64_t l = 0; l < L; ++l)
          out[l] = l < filled ? Item::make(order.encode(from[l]), at, last, floating) : Item::nothing();
    }
  }
  void trailing(E* out, int64_t k, int64_t n) const { fill(out, begin + k, n); }
  void leading(E* out, int64_t k, int64_t n) const { fill(out, begin + k + window() - 1, n); }

  void store(const E* in, int64_t k, int64_t n) const {
    using Item = Element<Key, E>;
    const Sequence<Key, E>& s = sequence;
    const OrderedKey<Key> order = s.order;
    for (int64_t i = s.skip(begin + k); i < n; i += s.step) {
      const E* from = in + i * L;
      const int64_t to = s.output(begin + k + i) * s.y_stride;
      for (int64_t l = 0; l < lanes; ++l) s.y[to + l] = order.decode(Item::key(from[l]));
      if constexpr (Item::kIndexed) {
        const int64_t at = begin + k + i - s.origin - s.first_tap;
        if (s.offset == OffsetType::u8) taps(static_cast<uint8_t*>(s.offsets) + to, from, at);
        if (s.offset == OffsetType::i16) taps(static_cast<int16_t*>(s.offsets) + to, from, at);
        if (s.offset == OffsetType::i32) taps(static_cast<int32_t*>(s.offsets) + to, from, at);
      }
    }
  }
  template <class Offset>
  void taps(Offset* to, const E* from, int64_t at) const {
    for (int64_t l = 0; l < lanes; ++l) {
      const int64_t position = Element<Key, E>::position(from[l], sequence.last);
      to[l] = position < 0 ? Offset(-1) : Offset(position - at);
    }
  }
};

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

// Blocks that are handled together: short ones would not be worth the calls.
template <class V, class E>
int64_t batch_of(int64_t block) {
  return std::max<int64_t>(1, kBlock<V, E> / 2 / block);
}

template <class V, class E>
int64_t van_herk_elements(int64_t whole, int64_t reach) {
  const int64_t block = std::min(whole, kBlock<V, E>), between = std::max<int64_t>(reach - block - 1, 0);
  const int64_t full = between / block;
  return 2 * (batch_of<V, E>(block) * block + 1) * V::kLanes + RecentMaximum<V, E>::elements(full) +
         (full + 1) * V::kLanes;
}

// Windows of `reach` vectors (the last one may overlap its neighbour: it ends where the window ends).
template <class E, class Vectors>
void van_herk(const Vectors& source, E* memory) {
  using V = typename Vectors::V;
  constexpr int64_t L = V::kLanes;
  const int64_t block = std::min(source.whole(), kBlock<V, E>);
  const int64_t between = std::max<int64_t>(source.reach() - block - 1, 0);  // leading vectors before the own block
  const int64_t full = between / block, rest = between % block;

  const int64_t batch = between ? block : batch_of<V, E>(block) * block;

  E* trail = memory;                  // [batch + 1, L]
  E* lead = trail + (batch + 1) * L;  // [batch + 1, L]
  E* tails = lead + (batch + 1) * L;  // [full + 1, L]: maximum of the last `rest` vectors of recent blocks
  RecentMaximum<V, E> recent(full, tails + (full + 1) * L);
  const V lowest = V::fill(Vectors::lowest());
  int64_t seen = 0;  // leading blocks so far
  const auto remember = [&](V whole_block, const E* tail) {
    V t = lowest;
    for (int64_t k = 0; k < rest; ++k) t = maximum(t, V::load(tail + k * L));
    t.store(tails + seen % (full + 1) * L);
    if (full) recent.push(whole_block);
    ++seen;
  };
  if (between) {  // the blocks that the first window needs; of the oldest, the tail alone
    source.leading(lead, -full * block - rest, rest);
    V t = lowest;
    for (int64_t k = 0; k < rest; ++k) t = maximum(t, V::load(lead + k * L));
    t.store(tails);
    seen = 1;
    for (int64_t b = -full; b < 0; ++b) {
      source.leading(lead, b * block, block);
      V m = lowest;
      for (int64_t k = 0; k < block; ++k) m = maximum(m, V::load(lead + k * L));
      remember(m, lead + (block - rest) * L);
    }
  }
  for (int64_t first = 0; first < source.vectors(); first += batch) {
    const int64_t wanted = std::min(batch, source.vectors() - first);
    const int64_t made = (wanted + block - 1) / block * block;
    source.trailing(trail, first, made);
    V middle = lowest;
    if (between) {
      middle = V::load(tails + seen % (full + 1) * L);  // the oldest: full + 1 blocks ago
      if (full) middle = maximum(middle, recent.get());
    }
    for (int64_t own = 0; own < made; own += block) {
      V suffix = middle;
      for (int64_t k = own + block - 1; k >= own; --k) {
        suffix = maximum(suffix, V::load(trail + k * L));
        suffix.store(trail + k * L);
      }
    }
    source.leading(lead, first, made);
    V prefix = lowest;
    for (int64_t own = 0; own < made; own += block) {
      prefix = lowest;
      for (int64_t k = own; k < own + block; ++k) {
        prefix = maximum(prefix, V::load(lead + k * L));
        maximum(prefix, V::load(trail + k * L)).store(trail + k * L);
      }
    }
    if (between) remember(prefix, lead + (block - rest) * L);
    source.store(trail, first, wanted);
  }
}

// Short windows along a row: the window is the union of up to four windows of a power of four.
template <class E>
constexpr int64_t kShort = 16 * kLanes<E>;
template <class E>
constexpr int64_t kTile = (16 << 10) / int64_t(sizeof(E));

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
void short_windows(const Sequence<Key, E>& s, int64_t begin, int64_t end, E* memory) {
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
    if (span >= kLanes<E>) {
      s.load_maxima(memory, k, n + window - kLanes<E>);
      widen(memory, n + window - span, span, int64_t(kLanes<E>));
    } else {
      s.load(memory, k, n + window - 1);
      widen(memory, n + window - span, span);
    }
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

// Results [begin, end) of one phase of one row; of `lanes` neighbouring rows where lanes > 0.
template <class Key, class E>
void stretch(const Sequence<Key, E>& s, int64_t begin, int64_t end, int64_t lanes, E* memory) {
  if (lanes > 0) {
    van_herk<E>(ColumnVectors<Key, E>{s, begin, end, lanes}, memory);
  } else if (s.windows.window <= kShort<E>) {
    short_windows(s, begin, end, memory);
  } else {
    van_herk<E>(RowVectors<Key, E>{s, begin, end}, memory);
  }
}

template <class Key, class E>
int64_t stretch_elements(int64_t window, bool columns) {
  if (columns) return van_herk_elements<typename ColumnVectors<Key, E>::V, E>(window, window);
  if (window <= kShort<E>) return kTile<E> + 2 * kShort<E>;
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
  constexpr int64_t kColumns = ColumnVectors<Key, E>::L;
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
