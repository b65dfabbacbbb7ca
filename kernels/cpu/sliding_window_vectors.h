// Vectors of elements, for sliding_window.h; stamped with it.
//
// An element is an ordered key, or a key packed with a position where offsets are asked for; either way one maximum
// decides.

// The machine's vector of E, as the compiler's own vector type; 128-bit elements go one by one.
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
template <class E>
constexpr int kLanes = Machine<E>::kLanes;

template <class E, int kCount = 1>
struct Vector {
  using M = typename Machine<E>::Vector;
  static constexpr int kLanes = kCount * Machine<E>::kLanes;
  M v[kCount];

  // One machine vector at a time: copied as a whole, the vectors of some levels go through memory.
  PYPERF_HD static Vector load(const E* p) {
    Vector r;
    for (int i = 0; i < kCount; ++i) memcpy(&r.v[i], p + i * Machine<E>::kLanes, sizeof(M));
    return r;
  }
  PYPERF_HD void store(E* p) const {
    for (int i = 0; i < kCount; ++i) memcpy(p + i * Machine<E>::kLanes, &v[i], sizeof(M));
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

// ---- neighbours ----

// Lanes kFrom, kFrom + 1, ... of low followed by high; 0 < kFrom < kLanes.
#if PYPERF_VECTOR_BYTES == 64
template <int kBytes>
PYPERF_HD __m512i neighbouring_bytes(__m512i low, __m512i high) {
  if constexpr (kBytes == 64) {
    return high;
  } else if constexpr (kBytes % 4 == 0) {
    return _mm512_maskz_alignr_epi32(__mmask16(-1), high, low, kBytes / 4);
  } else {  // one instruction moves bytes inside the quarters of a vector
    constexpr int kQuarter = kBytes / 16 * 16;
    const __m512i first = neighbouring_bytes<kQuarter>(low, high);
    return _mm512_alignr_epi8(neighbouring_bytes<kQuarter + 16>(low, high), first, kBytes % 16);
  }
}
template <class E, int kFrom>
PYPERF_HD typename Machine<E>::Vector neighbours(typename Machine<E>::Vector low, typename Machine<E>::Vector high) {
  return (typename Machine<E>::Vector)neighbouring_bytes<kFrom* int(sizeof(E))>((__m512i)low, (__m512i)high);
}
#else
template <class V, int kFrom, size_t... kLane>
PYPERF_HD V shuffled(V low, V high, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(low, high, int(kLane + kFrom)...);
}
template <class E, int kFrom>
PYPERF_HD typename Machine<E>::Vector neighbours(typename Machine<E>::Vector low, typename Machine<E>::Vector high) {
  return shuffled<typename Machine<E>::Vector, kFrom>(low, high, std::make_index_sequence<kLanes<E>>());
}
#endif

// The same from lane `from` on, known at run time only; where the machine has an instruction for it.
template <class E>
struct Neighbours {
  using V = typename Machine<E>::Vector;
#if PYPERF_VECTOR_BYTES == 64
  static constexpr bool kThere = sizeof(E) >= 2 && sizeof(E) <= 8;
  __m512i lanes;
  explicit Neighbours(int64_t from) {
    if constexpr (kThere) {
      V v{};
      for (int i = 0; i < kLanes<E>; ++i) v[i] = E(from + i);
      lanes = (__m512i)v;
    }
  }
  PYPERF_HD V operator()(V low, V high) const {
    const __m512i a = (__m512i)low, b = (__m512i)high;
    if constexpr (sizeof(E) == 2)
      return (V)_mm512_permutex2var_epi16(a, lanes, b);
    else if constexpr (sizeof(E) == 4)
      return (V)_mm512_permutex2var_epi32(a, lanes, b);
    else
      return (V)_mm512_permutex2var_epi64(a, lanes, b);
  }
#elif PYPERF_VECTOR_BYTES == 32
  static constexpr bool kThere = sizeof(E) == 4 || sizeof(E) == 8;
  __m256i words, in_high;
  explicit Neighbours(int64_t from) {
    typedef int Words __attribute__((vector_size(32)));
    Words w{}, h{};
    for (int i = 0; i < 8; ++i) {
      w[i] = int(from * int64_t(sizeof(E) / 4)) + i;
      h[i] = w[i] >= 8 ? -1 : 0;
    }
    words = (__m256i)w, in_high = (__m256i)h;
  }
  PYPERF_HD V operator()(V low, V high) const {
    return (V)_mm256_blendv_epi8(_mm256_permutevar8x32_epi32((__m256i)low, words),
                                 _mm256_permutevar8x32_epi32((__m256i)high, words), in_high);
  }
#else
  static constexpr bool kThere = false;
  explicit Neighbours(int64_t) {}
  V operator()(V low, V) const { return low; }
#endif
};

constexpr int log2_of(int n) { return n > 1 ? 1 + log2_of(n / 2) : 0; }

// Maxima of the 2^kSteps <= kLanes neighbours that end at each lane, in registers, for vectors in rising order. Each
// step looks into the vector before.
template <class E, int kSteps = log2_of(kLanes<E>)>
struct Doubling {
  using V = typename Machine<E>::Vector;
  V before[kSteps + 1];  // the elements, maxima of 2, of 4, ...

  PYPERF_HD explicit Doubling(E lowest) {
    for (V& v : before) v = Machine<E>::fill(lowest);
  }
  template <int kStep = 0>
  PYPERF_HD V operator()(V v) {
    if constexpr (kStep == kSteps) {
      return v;
    } else {
      const V near = neighbours<E, kLanes<E> - (1 << kStep)>(before[kStep], v);
      before[kStep] = v;
      return operator()<kStep + 1>(v > near ? v : near);
    }
  }
};

// ---- elements ----

// A key alone (E == Key), or a key in the high bits of E above its position in tie order. The low bits are 0 exactly
// where there is no element: padding, and NaN where it is ignored.
template <class Key, class E>
struct Element {
  static constexpr bool kIndexed = sizeof(E) > sizeof(Key);
  static constexpr int kShift = 8 * int(sizeof(E) - sizeof(Key));
  using Low =
      std::conditional_t<(sizeof(E) <= 4), uint32_t, std::conditional_t<sizeof(E) == 8, uint64_t, unsigned __int128>>;
  static constexpr Low kLowMask = kIndexed ? Low(Low(1) << kShift) - 1 : 0;
  // Positions are counted from the start of a stretch; this many of them fit.
  static constexpr int64_t kPositions = kIndexed && kShift < 62 ? (int64_t(1) << kShift) - 2 : INT64_MAX;

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
};

// a ^ (b & mask), one instruction where there is one that the compiler does not find.
template <class V, class Key>
PYPERF_HD V flipped(V a, V b, Key mask) {
#if PYPERF_VECTOR_BYTES == 64
  if constexpr (sizeof(V) == 64)
    return (V)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, (__m512i)(V{} + mask), 0x78);
  else if constexpr (sizeof(V) == 32)
    return (V)_mm256_ternarylogic_epi32((__m256i)a, (__m256i)b, (__m256i)(V{} + mask), 0x78);
  else
#endif
    return a ^ (b & mask);
}

// Elements a vector at a time.
template <class Key, class E>
struct Codec {
  using Item = Element<Key, E>;
  using Low = typename Item::Low;
  static constexpr bool kWhole = sizeof(E) < 16;  // 128-bit elements are scalars
  static constexpr int L = kLanes<E>;
  using V = typename Machine<E>::Vector;
  typedef Key Keys __attribute__((vector_size(L * sizeof(Key))));
  typedef Low Lows __attribute__((vector_size(L * sizeof(Low))));

  OrderedKey<Key> order;
  bool last, floating;

  static Lows iota(int64_t from) {
    Lows r;
    for (int i = 0; i < L; ++i) r[i] = Low(i);
    return r + Low(from);
  }

  // Elements from..from + L - 1 at these positions; `by` is their distance.
  PYPERF_HD V encoded(const Key* from, int64_t position, int64_t by) const {
    if constexpr (!kWhole) {
      return Item::make(order.encode(*from), position, last, floating);
    } else {
      Keys bits;
      memcpy(&bits, from, sizeof bits);
      bits ^= order.pre;
      const Keys ordered = flipped<Keys>(bits, bits >> OrderedKey<Key>::kSignShift, order.float_mask);
      const Keys nan = Keys{} + order.nan;
      const Keys keys = (bits & OrderedKey<Key>::kHighest) > order.infinity ? nan : ordered;
      if constexpr (!Item::kIndexed) {
        return keys;
      } else {
        const V high = __builtin_convertvector(keys, V) << Item::kShift;
        const Lows at = by ? iota(position) : Lows{} + Low(position);
        const Lows tie = last ? at + Low(1) : at ^ Item::kLowMask;
        const V nothing = high == Item::nothing();
        const V low = floating ? (V)tie & ~nothing : (V)tie;
        return high | low;
      }
    }
  }
  PYPERF_HD void store_keys(V e, Key* to) const {
    if constexpr (!kWhole) {
      *to = order.decode(Item::key(e));
    } else {
      Keys keys;
      if constexpr (Item::kIndexed)
        keys = __builtin_convertvector(e >> Item::kShift, Keys);
      else
        keys = e;
      const Keys natural = flipped<Keys>(keys, keys >> OrderedKey<Key>::kSignShift, order.float_mask) ^ order.pre;
      const Keys empty = Keys{} + order.empty_bits, top = Keys{} + order.top_bits;
      const Keys some = keys == OrderedKey<Key>::kHighest ? top : natural;
      const Keys bits = keys == OrderedKey<Key>::kLowest ? empty : some;
      memcpy(to, &bits, sizeof bits);
    }
  }
  // Taps: positions counted from `start` + lane * by.
  template <class Offset>
  PYPERF_HD void store_taps(V e, Offset* to, int64_t start, int64_t by) const {
    if constexpr (!kWhole) {
      const int64_t position = Item::position(e, last);
      *to = position < 0 ? Offset(-1) : Offset(position - start);
    } else {
      typedef Offset Offsets __attribute__((vector_size(L * sizeof(Offset))));
      const Lows low = (Lows)e & Item::kLowMask, at = by ? iota(start) : Lows{} + Low(start);
      const Lows taps = (last ? low - Low(1) : low ^ Item::kLowMask) - at, none = Lows{} - Low(1);
      const Lows known = low == Low(0) ? none : taps;
      const Offsets offsets = __builtin_convertvector(known, Offsets);
      memcpy(to, &offsets, sizeof offsets);
    }
  }

  // The first n lanes.
  template <int kCount>
  PYPERF_HD void store_keys(const Vector<E, kCount>& e, Key* to, int64_t n) const {
    some(e, to, n, [&](V v, Key* at) { store_keys(v, at); });
  }
  template <int kCount>
  PYPERF_HD void store_taps(const Vector<E, kCount>& e, OffsetType type, void* to, int64_t at, int64_t start,
                            int64_t by, int64_t n) const {
    const auto store = [&](auto* typed) {
      some(e, typed + at, n, [&](V v, auto* to) { store_taps(v, to, start, by); });
    };
    if (type == OffsetType::u8) store(static_cast<uint8_t*>(to));
    if (type == OffsetType::i16) store(static_cast<int16_t*>(to));
    if (type == OffsetType::i32) store(static_cast<int32_t*>(to));
  }

 private:
  template <int kCount, class T, class Store>
  PYPERF_HD static void some(const Vector<E, kCount>& e, T* to, int64_t n, const Store& store) {
    T whole[kCount * L];
    T* const at = n == kCount * L ? to : whole;
    for (int i = 0; i < kCount; ++i) store(e.v[i], at + i * L);
    if (at == whole) memcpy(to, whole, size_t(n) * sizeof(T));
  }
};
