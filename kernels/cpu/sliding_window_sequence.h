// One phase of one row as a sequence of elements, and its vectors, for sliding_window.h; stamped with it.

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

  Codec<Key, E> codec() const { return {order, last, floating}; }
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
    const Key* from = inside < beyond ? x + position(j + inside) * x_stride : x;  // x may be null: an empty row
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

  bool adjacent() const { return windows.dilation * x_stride == 1; }
  bool dense() const { return phases == 1 && step == 1 && y_stride == 1; }
  int64_t skip(int64_t k) const { return step == 1 ? 0 : (step - k % step) % step; }
  int64_t output(int64_t k) const { return phase + k / step * phases; }
};

// How vectors are asked for: as memory holds them, without edges, gaps or halves; as padding alone; or in any way.
struct Direct : std::true_type {};
struct Outside : std::true_type {};
struct Anyhow : std::false_type {};

// A few elements or results of a row that cannot be loaded or stored as vectors. It lives apart from what uses it,
// whose own members can then stay in registers.
template <class Key, class E>
struct Stage {
  static constexpr int64_t L = kLanes<E>, kRoom = 16 * L;
  int64_t begin = 0, end = 0;
  E elements[kRoom];

  // Elements j .. j + L - 1; `n` are taken from the sequence, those after them or those before. Neither a vector's
  // value nor a class that holds one crosses a call: GCC 12 clears the upper half of such a result.
  __attribute__((noinline)) const E* load(const Sequence<Key, E>& s, int64_t j, int64_t n, bool rising) {
    if (j < begin || j + L > end) {
      begin = rising ? j : j + L - n;
      end = begin + n;
      s.load(elements, begin, n);
    }
    return elements + (j - begin);
  }
  // Results k .. k + n - 1.
  PYPERF_HD void store(const Sequence<Key, E>& s, const Vector<E>& v, int64_t k, int64_t n) {
    if (begin == end) begin = end = k;
    v.store(elements + (end - begin));
    end += n;
    if (end - begin > kRoom - L) flush(s);
  }
  __attribute__((noinline)) void flush(const Sequence<Key, E>& s) {
    if (begin < end) s.store(elements, begin, end - begin);
    begin = end = 0;
  }
};

// Elements of a row as vectors, asked for in rising order (kRising) or in falling order.
template <class Key, class E, bool kRising>
struct RowElements {
  static constexpr int64_t L = kLanes<E>;
  const Sequence<Key, E>& sequence;
  Stage<Key, E>& stage;
  const Codec<Key, E> codec;
  const int64_t first, last, origin;  // position 0 is element -first; vectors may end at position `last`
  const Key* const x;
  const bool padded;  // nothing lies outside

  PYPERF_HD RowElements(const Sequence<Key, E>& s, Stage<Key, E>& stage)
      : sequence(s),
        stage(stage),
        codec(s.codec()),
        first(s.position(0)),
        last(s.adjacent() ? s.windows.length : -1),
        origin(s.origin),
        x(s.x),
        padded(s.adjacent() && s.windows.edge == Edge::constant) {}

  // Whether elements j .. j + n - 1 can be loaded as vectors.
  bool direct(int64_t j, int64_t n) const { return first + j >= 0 && first + j + n <= last; }
  // Whether there is nothing at elements j .. j + n - 1.
  PYPERF_HD bool outside(int64_t j, int64_t n) const { return padded && (first + j + n <= 0 || first + j >= last); }
  // Elements j .. j + L - 1.
  PYPERF_HD Vector<E> operator()(int64_t, Outside) const { return Vector<E>::fill(Element<Key, E>::nothing()); }
  template <bool kDirect>
  PYPERF_HD Vector<E> operator()(int64_t j, std::bool_constant<kDirect>) const {
    if (kDirect || direct(j, L)) return {{codec.encoded(x + (first + j), j - origin, 1)}};
    if (padded) {
      const int64_t position = first + j;
      const auto nothing = Machine<E>::fill(Element<Key, E>::nothing());
      if (outside(j, L)) return {{nothing}};
      if constexpr (Neighbours<E>::kThere) {
        if (last >= L) {  // the nearest vector inside, shifted
          const int64_t by = position - std::clamp<int64_t>(position, 0, last - L);
          const auto inside = codec.encoded(x + (position - by), j - by - origin, 1);
          return {{by < 0 ? Neighbours<E>(L + by)(nothing, inside) : Neighbours<E>(by)(inside, nothing)}};
        }
      }
    }
    return Vector<E>::load(stage.load(sequence, j, sequence.adjacent() ? L : stage.kRoom, kRising));
  }
};

// Results of a row as vectors, in rising order.
template <class Key, class E>
struct RowResults {
  static constexpr int64_t L = kLanes<E>;
  const Sequence<Key, E>& sequence;
  Stage<Key, E>& stage;
  const Codec<Key, E> codec;
  const int64_t dense_end;  // up to there vectors may be stored; 0 where results have gaps
  const OffsetType offset;
  Key* const y;
  void* const offsets;
  const int64_t origin;

  PYPERF_HD RowResults(const Sequence<Key, E>& s, int64_t end, Stage<Key, E>& stage)
      : sequence(s),
        stage(stage),
        codec(s.codec()),
        dense_end(s.dense() ? end : 0),
        offset(s.offset),
        y(s.y),
        offsets(s.offsets),
        origin(s.origin + s.first_tap) {}

  // Results k .. k + L - 1, of which those before `end` are wanted.
  template <bool kDirect>
  PYPERF_HD void operator()(const Vector<E>& e, int64_t k, int64_t end, std::bool_constant<kDirect>) const {
    const int64_t n = kDirect ? L : std::min(L, end - k);
    if (!kDirect && dense_end == 0) return stage.store(sequence, e, k, n);
    codec.store_keys(e, y + k, n);
    if constexpr (Element<Key, E>::kIndexed) codec.store_taps(e, offset, offsets, k, k - origin, 1, n);
  }
};

// ---- what van Herk's recursion runs over ----
//
// Vector k belongs to the outputs whose lanes it holds. Its windows are covered by vectors from the one they start with
// (`Starting`, asked for in falling order) to the one they end with (`Ending`, in rising order).
// Along a row: lane l of vector k belongs to output kL + l.
template <class Key, class E>
struct Rows {
  using V = Vector<E>;
  static constexpr int64_t L = V::kLanes;
  static constexpr bool kDirectBlocks = true;
  const Sequence<Key, E>& sequence;
  int64_t begin, end;  // results wanted; vector 0 starts at `begin`

  static E lowest() { return Element<Key, E>::nothing(); }
  int64_t vectors() const { return (end - begin + L - 1) / L; }
  int64_t whole() const { return sequence.windows.window / L; }
  int64_t reach() const { return (sequence.windows.window + L - 1) / L; }

  // A window is whole() vectors and a part of one more, so that the vector it starts with lies across two of a buffer.
  struct Across {
    const int64_t from;
    const Neighbours<E> lanes;
    PYPERF_HD explicit Across(const Rows& r) : from(L - r.sequence.windows.window % L), lanes(from) {}
    // `low` and `high` are at `at` and after it. Loads that straddle recent stores would wait for these.
    PYPERF_HD V operator()(const V& low, const V& high, const E* at) const {
      if constexpr (Neighbours<E>::kThere) return {{lanes(low.v[0], high.v[0])}};
      return V::load(at + from);
    }
  };
  struct Scratch {
    Stage<Key, E> ending, starting, results;
  };
  // Vectors that end where windows end, as maxima of 2^kSteps neighbours.
  template <int kSteps = log2_of(int(L))>
  class Ending {
    const RowElements<Key, E, true> elements;
    Doubling<E, kSteps> doubling;
    const int64_t from;

   public:
    PYPERF_HD Ending(const Rows& r, int64_t first, Scratch& scratch)
        : elements(r.sequence, scratch.ending), doubling(lowest()), from(r.begin + r.sequence.windows.window - 1) {
      if (kSteps && int64_t(1) << kSteps == L) (*this)(first - 1, Anyhow());  // shorter maxima reach back less far
    }
    PYPERF_HD bool direct(int64_t k, int64_t n) const { return elements.direct(from + k * L, n * L); }
    PYPERF_HD bool outside(int64_t k, int64_t n) const { return elements.outside(from + k * L, n * L); }
    template <class D>
    PYPERF_HD V operator()(int64_t k, D direct) {
      return {{doubling(elements(from + k * L, direct).v[0])}};
    }
  };
  // Vectors that end with the first kLanes elements of windows.
  class Starting {
    const RowElements<Key, E, false> elements;
    const int64_t from;

   public:
    PYPERF_HD Starting(const Rows& r, Scratch& scratch)
        : elements(r.sequence, scratch.starting), from(r.begin + L - 1) {}
    PYPERF_HD bool direct(int64_t k, int64_t n) const { return elements.direct(from + k * L, n * L); }
    PYPERF_HD bool outside(int64_t k, int64_t n) const { return elements.outside(from + k * L, n * L); }
    template <class D>
    PYPERF_HD V operator()(int64_t k, D direct) const {
      return elements(from + k * L, direct);
    }
  };
  // From maxima lane by lane to those of kLanes neighbours.
  class Neighbourhood {
    Doubling<E> doubling;

   public:
    PYPERF_HD Neighbourhood() : doubling(lowest()) {}
    PYPERF_HD V operator()(const V& e) { return {{doubling(e.v[0])}}; }
  };
  class Results {
    const RowResults<Key, E> results;
    const int64_t begin, end;

   public:
    PYPERF_HD Results(const Rows& r, Scratch& scratch)
        : results(r.sequence, r.end, scratch.results), begin(r.begin), end(r.end) {}
    PYPERF_HD bool direct(int64_t k, int64_t n) const { return begin + (k + n) * L <= results.dense_end; }
    template <class D>
    PYPERF_HD void operator()(const V& e, int64_t k, D direct) const {
      results(e, begin + k * L, end, direct);
    }
    void finish() const { results.stage.flush(results.sequence); }
  };
};

// Along a dimension that is not the dense one: a vector holds one element of each of L neighbouring rows, and takes
// whole cache lines with it.
template <class Key, class E>
struct Columns {
  static constexpr int kCount = 4;
  using V = Vector<E, kCount>;
  static constexpr int64_t L = V::kLanes;
  static constexpr bool kDirectBlocks = false;  // columns of thousands of rows are too rare for more code
  using Item = Element<Key, E>;
  const Sequence<Key, E>& sequence;
  int64_t begin, end;
  int64_t lanes;  // <= L

  static E lowest() { return Item::nothing(); }
  int64_t vectors() const { return end - begin; }
  int64_t whole() const { return sequence.windows.window; }
  int64_t reach() const { return sequence.windows.window; }

  struct Across {
    PYPERF_HD explicit Across(const Columns&) {}
    PYPERF_HD V operator()(const V&, const V& high, const E*) const { return high; }
  };
  struct Scratch {};
  class Elements {
    const Sequence<Key, E>& s;
    const Codec<Key, E> codec;
    const int64_t lanes, from, first, length, by;
    const Key* const x;

   public:
    PYPERF_HD Elements(const Columns& c, int64_t from)
        : s(c.sequence),
          codec(s.codec()),
          lanes(c.lanes),
          from(from),
          first(s.position(from)),
          length(s.windows.length),
          by(s.windows.dilation),
          x(s.x) {}
    PYPERF_HD bool direct(int64_t k, int64_t n) const {
      return lanes == L && first + k * by >= 0 && first + (k + n - 1) * by < length;
    }
    PYPERF_HD bool outside(int64_t, int64_t) const { return false; }
    template <bool kDirect>
    PYPERF_HD V operator()(int64_t k, std::bool_constant<kDirect>) const {
      const int64_t at = from + k - s.origin, source = kDirect ? first + k * by : s.windows.source(first + k * by);
      V r = V::fill(lowest());
      if (!kDirect && source < 0) return r;
      const Key* row = x + source * s.x_stride;
      if (kDirect || lanes == L) {
        for (int i = 0; i < kCount; ++i) r.v[i] = codec.encoded(row + i * kLanes<E>, at, 0);
        return r;
      }
      E some[L];
      r.store(some);
      for (int64_t l = 0; l < lanes; ++l) some[l] = Item::make(codec.order.encode(row[l]), at, s.last, s.floating);
      return V::load(some);
    }
  };
  template <int = 0>
  struct Ending : Elements {
    PYPERF_HD Ending(const Columns& c, int64_t, Scratch&) : Elements(c, c.begin + c.sequence.windows.window - 1) {}
  };
  struct Starting : Elements {
    PYPERF_HD Starting(const Columns& c, Scratch&) : Elements(c, c.begin) {}
  };
  struct Neighbourhood {
    PYPERF_HD V operator()(const V& e) const { return e; }
  };
  class Results {
    const Sequence<Key, E>& s;
    const Codec<Key, E> codec;
    const int64_t begin, lanes;

   public:
    PYPERF_HD Results(const Columns& c, Scratch&) : s(c.sequence), codec(s.codec()), begin(c.begin), lanes(c.lanes) {}
    PYPERF_HD bool direct(int64_t, int64_t) const { return s.step == 1 && lanes == L; }
    template <bool kDirect>
    PYPERF_HD void operator()(const V& e, int64_t k, std::bool_constant<kDirect>) const {
      k += begin;
      if (!kDirect && s.step > 1 && k % s.step) return;
      const int64_t to = s.output(k) * s.y_stride;
      const int64_t n = kDirect ? L : lanes;
      codec.store_keys(e, s.y + to, n);
      if constexpr (Item::kIndexed) codec.store_taps(e, s.offset, s.offsets, to, k - s.origin - s.first_tap, 0, n);
    }
    void finish() const {}
  };
};
