// Rational-quadratic splines on a CPU, one or two vectors of elements at a time. Stamped once for each SIMD level
// (simd_levels.h); prelude: that of parameter_rows.h, ../math/coupling.h, ../common/sample_units.h.
#include "parameter_rows.h"
//
#include "../math/coupling_spline.h"

constexpr int64_t kSumLanes = 32;  // of a sum of gradients, so that it does not depend on the width of vectors

// What a thread works in: blocks of two vectors of elements, so that the long chains of one hide behind the other's.
template <class R>
struct SplineScratch {
  static constexpr int64_t L = PairMachine<VectorMachine<R>>::kLanes;
  int64_t bins, parameters;
  R* raw;                     // [parameters, L], replaced by their gradients
  R* exponentials;            // [2, bins, L]
  R *x, *bound, *grad_y, *y;  // [L]
  R* logdet;                  // [SampleUnits::kElements + L], of a unit; or the gradients
  double* sums;               // [parameters, kSumLanes], of shared gradients

  static int64_t bytes(int64_t bins, int64_t parameters) {
    return int64_t(sizeof(R)) * ((parameters + 2 * bins + 4 + 1) * L + SampleUnits::kElements) +
           int64_t(sizeof(double)) * parameters * kSumLanes;
  }
  SplineScratch(int64_t bins, int64_t parameters, void* memory) : bins(bins), parameters(parameters) {
    R* p = static_cast<R*>(memory);
    exponentials = p, p += 2 * bins * L;
    raw = p, p += parameters * L;
    x = p, p += L;
    bound = p, p += L;
    grad_y = p, p += L;
    y = p, p += L;
    logdet = p, p += SampleUnits::kElements + L;
    sums = reinterpret_cast<double*>(p);
  }

  void clear() const { std::fill_n(sums, parameters * kSumLanes, 0.0); }
  // Adds the gradients of n elements, the first of which is at `place` of the lanes.
  void add(int64_t place, int64_t n) const {
    constexpr int64_t kLanes = VectorMachine<R>::kLanes;
    for (int64_t j = 0; j < parameters; ++j) {
      double* const to = sums + j * kSumLanes + place;
      const R* const from = raw + j * L;
      int64_t l = 0;
      for (; l + kLanes <= n; l += kLanes) {
        LanesOf<double, kLanes> sum;
        memcpy(&sum, to + l, sizeof sum);
        sum += load_lanes<double, kLanes>(from + l);
        memcpy(to + l, &sum, sizeof sum);
      }
      for (; l < n; ++l) to[l] += double(from[l]);
    }
  }
};

// A block, or the first vector of it, from scratch memory to scratch memory. kBins: 0 where their number is known at
// run time.
template <class M, bool kBackward, int kBins, class R>
__attribute__((noinline)) void spline_block_of(const coupling::Spline<R>& c, const SplineScratch<R>& scratch,
                                               R* logdet) {
  using V = typename M::V;
  constexpr int64_t L = SplineScratch<R>::L;
  const int64_t bins = kBins ? kBins : c.bins;
  R* const raw = scratch.raw;
  const auto widths = [=](int64_t j) __attribute__((always_inline)) { return M::load(raw + j * L); };
  const auto heights = [=](int64_t j) __attribute__((always_inline)) { return M::load(raw + (bins + j) * L); };
  const auto derivatives = [=](int64_t j) __attribute__((always_inline)) { return M::load(raw + (2 * bins + j) * L); };
  V held[2 * kBins + 1];
  V* const ew = kBins ? held : reinterpret_cast<V*>(scratch.exponentials);
  V* const eh = ew + bins;
  math::SplinePoint<M> point;
  const V x = M::load(scratch.x);
  const V bound = c.scaled ? M::load(scratch.bound) : V{};
  math::spline_locate<M, kBins, true>(c, x, bound, widths, heights, derivatives, ew, eh, point);
  if constexpr (kBackward) {
    const V gradient = math::spline_gradients<M, kBins, true>(
        c, point, M::load(scratch.grad_y), M::load(logdet), widths, heights, ew, eh,
        [=](int64_t j, V g) __attribute__((always_inline)) { M::store(raw + j * L, g); },
        [=](int64_t j, V g) __attribute__((always_inline)) { M::store(raw + (bins + j) * L, g); },
        [=](int64_t j, V g) __attribute__((always_inline)) { M::store(raw + (2 * bins + j) * L, g); });
    M::store(scratch.y, gradient);
  } else {
    V y, l;
    math::spline_value<M, true>(c, point, x, y, l);
    M::store(scratch.y, y);
    M::store(logdet, l);
  }
}

template <class R, bool kBackward>
void spline_block(const coupling::Spline<R>& c, const SplineScratch<R>& scratch, int64_t n, R* logdet) {
  using M = VectorMachine<R>;
  using Pair = PairMachine<M>;
  if constexpr (PYPERF_VECTOR_BYTES > 16) {  // all this takes long to compile
    if (n <= M::kLanes) {
      if constexpr (sizeof(R) == 4) {
        if (c.bins == 8) return spline_block_of<M, kBackward, 8>(c, scratch, logdet);
      }
      return spline_block_of<M, kBackward, 0>(c, scratch, logdet);
    }
    if (c.bins == 8) return spline_block_of<Pair, kBackward, 8>(c, scratch, logdet);
    if constexpr (sizeof(R) == 4) {
      if (c.bins == 10) return spline_block_of<Pair, kBackward, 10>(c, scratch, logdet);
      if (c.bins == 16) return spline_block_of<Pair, kBackward, 16>(c, scratch, logdet);
    }
  }
  spline_block_of<Pair, kBackward, 0>(c, scratch, logdet);
}

// What the elements first, first + 1, ... have in `aside`; lanes behind the n-th repeat it.
template <class S, class T>
void load_aside(const coupling::Aside& aside, int64_t first, int64_t n, int64_t lanes, T* out) {
  int64_t row = first / aside.n, within = first - row * aside.n, start[1];
  aside.rows.offsets(row, start);
  for (int64_t i = 0; i < lanes; ++i) {
    out[i] = T(static_cast<const S*>(aside.data)[start[0] + within * aside.stride]);
    if (i >= n - 1 || ++within < aside.n) continue;
    within = 0;
    aside.rows.offsets(++row, start);
  }
}

// Between storage and the numbers of a block of n elements.
template <class R>
struct SplineStorage {
  using Load = void (*)(const void*, const LaneOffsets& at, int64_t n, R*);
  using Store = void (*)(const R*, const LaneOffsets& at, int64_t n, void*);
  using LoadAside = void (*)(const coupling::Aside&, int64_t first, int64_t n, int64_t lanes, R*);
  using LoadParameters = void (*)(const void*, const LaneOffsets& at, int64_t stride, int64_t count, int64_t n, R*);
  using StoreParameters = void (*)(R*, const LaneOffsets& at, int64_t stride, int64_t count, int64_t n, void*);
  static constexpr int64_t kLanes = VectorMachine<R>::kLanes, kPitch = SplineScratch<R>::L;

  template <class S>
  static void load(const void* p, const LaneOffsets& at, int64_t n, R* out) {
    for (int64_t i = 0; i < n; i += kLanes)
      load_block(static_cast<const S*>(p), at.from(i), std::min(kLanes, n - i), out + i);
  }
  template <class S>
  static void store(const R* in, const LaneOffsets& at, int64_t n, void* p) {
    for (int64_t i = 0; i < n; i += kLanes)
      store_block(in + i, at.from(i), std::min(kLanes, n - i), static_cast<S*>(p));
  }
  template <class S>
  static void load_all(const void* p, const LaneOffsets& at, int64_t stride, int64_t count, int64_t n, R* out) {
    for (int64_t i = 0; i < n; i += kLanes)
      load_parameters(static_cast<const S*>(p), at.from(i), stride, count, std::min(kLanes, n - i), out + i, kPitch);
  }
  template <class S>
  static void store_all(R* in, const LaneOffsets& at, int64_t stride, int64_t count, int64_t n, void* p) {
    for (int64_t i = 0; i < n; i += kLanes)
      store_parameters(in + i, kPitch, at.from(i), stride, count, std::min(kLanes, n - i), static_cast<S*>(p));
  }

  Load load_input, load_logdet;
  LoadAside load_bounds;
  Store store_result, store_logdet;
  LoadParameters load_raw;
  StoreParameters store_raw;

  explicit SplineStorage(const coupling::SplineElements& e) {
    with_storage(e.type, [&](auto s) { load_input = load<decltype(s)>, store_result = store<decltype(s)>; });
    with_storage(e.logdet_type, [&](auto s) { load_logdet = load<decltype(s)>, store_logdet = store<decltype(s)>; });
    load_bounds = e.logdet_type == Storage::f64 ? load_aside<double, R> : load_aside<float, R>;
    with_storage(e.parameter_type, [&](auto s) {
      if constexpr (sizeof s <= sizeof(R)) load_raw = load_all<decltype(s)>, store_raw = store_all<decltype(s)>;
    });
  }
};

// Visits elements one after the other, with the offsets of their operands.
struct SplineWalk {
  const coupling::SplineElements& e;
  int64_t row, within, at[coupling::kSplineOperands];

  SplineWalk(const coupling::SplineElements& e, int64_t i) : e(e), row(i / e.n), within(i - row * e.n) {
    e.rows.offsets(row, at);
    for (int k = 0; k < coupling::kSplineOperands; ++k) at[k] += within * e.stride[k];
  }
  void next() {
    if (++within == e.n) return next_row();
    for (int k = 0; k < coupling::kSplineOperands; ++k) at[k] += e.stride[k];
  }
  void next_row() {
    within = 0;
    if (++row < e.rows.count) e.rows.offsets(row, at);
  }
};

// Elements pass through spline_block a block at a time: neighbours in a row, or, where rows are short, neighbours in
// the walk, each at a place of its own.
template <class R, bool kBackward>
struct SplineBlocks {
  static constexpr int64_t L = SplineScratch<R>::L;
  const coupling::SplineElements& e;
  const coupling::Spline<R>& c;
  const SplineStorage<R>& storage;
  const SplineScratch<R>& scratch;

  // Elements of a block in a row. Intel's processors have too few loads under way for the rows of two vectors where few
  // bins leave little to compute meanwhile: measured on Sapphire Rapids; on a Zen 5, two vectors take 0.8 of the time.
  int64_t length() const {
#if PYPERF_VECTOR_BYTES == 64
    constexpr int64_t kCached = int64_t(1) << 20;  // bytes
    if (sizeof(R) == 4 && e.parameter_type == Storage::f32 && c.bins <= 10 &&
        e.count * scratch.parameters * 4 > kCached && __builtin_cpu_is("intel"))
      return L / 2;
#endif
    return L;
  }
  bool by_lane() const {
    if (e.rows.count == 1) return false;
    return (e.n % L && e.n < 4 * L) || (kBackward && e.shared && e.n % kSumLanes);
  }

  // visit(operand, parameters before it, parameters of it)
  template <class Visit>
  void each_parameter(int first_operand, bool packed, const Visit& visit) const {
    if (packed) return visit(first_operand, int64_t(0), scratch.parameters);
    const int64_t bins = c.bins, counts[] = {bins, bins, c.derivatives()};
    int64_t before = 0;
    for (int k = 0; k < 3; before += counts[k++]) visit(first_operand + k, before, counts[k]);
  }

  // Elements i, ..., i + n - 1, operands at `start`, or at `table`. In a unit that starts with element `begin`.
  // ahead: for how many of those from L elements on to fetch parameters.
  void run(int64_t begin, int64_t i, int64_t n, const int64_t* start, const int64_t* table, int64_t ahead) const {
    using namespace coupling;
    R* const logdet = scratch.logdet + (i - begin);
    const auto at = [&](int k, int64_t element) {
      const Storage type = k >= kWidths && k <= kGradDerivatives ? e.parameter_type
                           : k == kLogdet                        ? e.logdet_type
                                                                 : e.type;
      return static_cast<char*>(e.data[k]) + (start[k] + element * e.stride[k]) * storage_bytes(type);
    };
    const auto lanes = [&](int k) { return LaneOffsets{e.stride[k], table ? table + k : nullptr, kSplineOperands}; };
    bool on[L];
    storage.load_input(at(kInput, 0), lanes(kInput), n, scratch.x);
    if (c.scaled) storage.load_bounds(e.bounds, i, n, L, scratch.bound);
    if (e.mask.data) load_aside<bool>(e.mask, i, n, L, on);
    each_parameter(kWidths, e.packed, [&](int k, int64_t before, int64_t count) {
      storage.load_raw(at(k, 0), lanes(k), e.parameter_stride[k], count, n, scratch.raw + before * L);
      if (ahead && e.parameter_stride[k] == 1)  // a block takes longer than loads may wait
        prefetch(at(k, L), ahead * e.stride[k] * storage_bytes(e.parameter_type));
    });
    if constexpr (kBackward) {
      storage.load_input(at(kGradOutput, 0), lanes(kGradOutput), n, scratch.grad_y);
      if (!e.summed) storage.load_logdet(at(kLogdet, 0), lanes(kLogdet), n, logdet);
    }
    spline_block<R, kBackward>(c, scratch, n, logdet);
    for (int64_t l = 0; e.mask.data && l < n; ++l) {
      if (on[l]) continue;
      scratch.y[l] = kBackward ? scratch.grad_y[l] : scratch.x[l];
      if (!kBackward) logdet[l] = 0;
      for (int64_t j = 0; kBackward && j < scratch.parameters; ++j) scratch.raw[j * L + l] = 0;
    }
    storage.store_result(scratch.y, lanes(kResult), n, at(kResult, 0));
    if (kBackward && e.shared) {
      scratch.add((i - begin) % kSumLanes, n);
    } else if constexpr (kBackward) {
      each_parameter(kGradWidths, e.grads_packed, [&](int k, int64_t before, int64_t count) {
        storage.store_raw(scratch.raw + before * L, lanes(k), e.parameter_stride[k], count, n, at(k, 0));
      });
    } else if (!e.summed) {
      storage.store_logdet(logdet, lanes(kLogdet), n, at(kLogdet, 0));
    }
  }
};

// Elements [begin, end), a unit of samples.
template <class R, bool kBackward>
void spline_unit(const coupling::SplineElements& e, const coupling::Spline<R>& c, const SplineStorage<R>& storage,
                 const SplineScratch<R>& scratch, int64_t begin, int64_t end) {
  using namespace coupling;
  constexpr int64_t L = SplineScratch<R>::L;
  const SplineBlocks<R, kBackward> blocks{e, c, storage, scratch};
  if (kBackward && e.summed) {
    for (int64_t i = begin; i < end;) {
      const int64_t sample = i / e.sample_size, stop = std::min(end, (sample + 1) * e.sample_size);
      R g;
      storage.load_logdet(static_cast<const char*>(e.sample_logdet) + sample * storage_bytes(e.logdet_type),
                          LaneOffsets{}, 1, scratch.x);
      g = scratch.x[0];
      for (; i < stop; ++i) scratch.logdet[i - begin] = g;
    }
  }
  SplineWalk walk(e, begin);
  if (blocks.by_lane()) {
    int64_t table[L * kSplineOperands];
    const int64_t start[kSplineOperands] = {};
    for (int64_t i = begin; i < end; i += L) {
      const int64_t n = std::min(L, end - i);
      for (int64_t l = 0; l < n; ++l, walk.next()) memcpy(table + l * kSplineOperands, walk.at, sizeof walk.at);
      blocks.run(begin, i, n, start, table, 0);
    }
    return;
  }
  const int64_t length = blocks.length();
  for (int64_t i = begin; i < end; walk.next_row()) {
    const int64_t stop = std::min(end, i + e.n - walk.within);
    int64_t start[kSplineOperands];
    for (int64_t first = i; i < stop; i += length) {
      for (int k = 0; k < kSplineOperands; ++k) start[k] = walk.at[k] + (i - first) * e.stride[k];
      blocks.run(begin, i, std::min(length, stop - i), start, nullptr, i + L + length <= stop ? length : 0);
    }
    i = stop;
  }
}

// The forward leaves in partials[unit] the sum of a unit that is a piece of a sample, and a backward with shared
// parameters [unit, parameters] of them.
template <class R, bool kBackward, class Parallel>
void spline(const coupling::SplineElements& e, const coupling::Spline<R>& c, double* partials,
            const Parallel& parallel) {
  const int64_t bins = c.bins, count = 2 * bins + c.derivatives();
  const SampleUnits units(e.samples, e.sample_size);
  const SplineStorage<R> storage(e);
  const bool shares = kBackward && e.shared, sums = !kBackward && e.summed;
  parallel(units.count, 2, SplineScratch<R>::bytes(bins, count), [&](int64_t first, int64_t last, void* memory) {
    const SplineScratch<R> scratch(bins, count, memory);
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t begin = units.begin(unit), end = units.end(unit), sample = units.first_sample(unit);
      if (shares) {
        const int64_t size = units.pieces > 1 ? end - begin : e.sample_size;
        double* to = units.pieces > 1 ? partials + unit * count : e.shared + sample * count;
        for (int64_t i = begin; i < end; i += size, to += count) {
          scratch.clear();
          spline_unit<R, kBackward>(e, c, storage, scratch, i, i + size);
          for (int64_t j = 0; j < count; ++j) to[j] = ordered_sum(scratch.sums + j * kSumLanes, kSumLanes);
        }
        continue;
      }
      spline_unit<R, kBackward>(e, c, storage, scratch, begin, end);
      if (!sums) continue;
      if (units.pieces > 1) {
        partials[unit] = ordered_sum(scratch.logdet, end - begin);
        continue;
      }
      const int64_t samples = e.sample_size ? (end - begin) / e.sample_size : 0;
      for (int64_t s = 0; s < samples; ++s) {
        const R sum = R(ordered_sum(scratch.logdet + s * e.sample_size, e.sample_size));
        scratch.x[0] = sum;
        storage.store_logdet(scratch.x, LaneOffsets{}, 1,
                             static_cast<char*>(e.sample_logdet) + (sample + s) * storage_bytes(e.logdet_type));
      }
    }
  });
  if (units.pieces == 1) return;
  for (int64_t s = 0; sums && s < e.samples; ++s) {
    R sum[SplineScratch<R>::L] = {R(ordered_sum(partials + s * units.pieces, units.pieces))};
    storage.store_logdet(sum, LaneOffsets{}, 1, static_cast<char*>(e.sample_logdet) + s * storage_bytes(e.logdet_type));
  }
  for (int64_t s = 0; shares && s < e.samples; ++s) {
    double* const to = e.shared + s * count;
    std::fill_n(to, count, 0.0);
    for (int64_t piece = 0; piece < units.pieces; ++piece)
      for (int64_t j = 0; j < count; ++j) to[j] += partials[(s * units.pieces + piece) * count + j];
  }
}
