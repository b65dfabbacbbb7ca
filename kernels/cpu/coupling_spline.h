// Rational-quadratic splines on a CPU, a vector of elements at a time. Stamped once for each SIMD level
// (simd_levels.h); prelude: that of elements.h, ../math/coupling.h, ../common/sample_units.h.
#include "elements.h"
//
#include "../math/coupling_spline.h"

// What a thread works in.
template <class R>
struct SplineScratch {
  using M = VectorMachine<R>;
  static constexpr int64_t L = M::kLanes;
  int64_t bins, parameters;
  R* raw;                           // [parameters, L], replaced by their gradients
  typename M::V *widths, *heights;  // [bins]: exponentials
  R *x, *bound, *grad_y, *y;        // [L]
  R* logdet;                        // [SampleUnits::kElements + L], of a unit; or the gradients

  static int64_t bytes(int64_t bins, int64_t parameters) {
    return int64_t(sizeof(R)) * ((parameters + 2 * bins + 4 + 1) * L + SampleUnits::kElements);
  }
  SplineScratch(int64_t bins, int64_t parameters, void* memory) : bins(bins), parameters(parameters) {
    R* p = static_cast<R*>(memory);
    widths = reinterpret_cast<typename M::V*>(p), p += bins * L;
    heights = reinterpret_cast<typename M::V*>(p), p += bins * L;
    raw = p, p += parameters * L;
    x = p, p += L;
    bound = p, p += L;
    grad_y = p, p += L;
    y = p, p += L;
    logdet = p;
  }
};

// One vector of elements, from scratch memory to scratch memory.
template <class R, bool kBackward>
__attribute__((noinline)) void spline_block(const coupling::Spline<R>& c, const SplineScratch<R>& scratch, R* logdet) {
  using M = VectorMachine<R>;
  using V = typename M::V;
  constexpr int64_t L = M::kLanes;
  const int64_t bins = c.bins;
  R* const raw = scratch.raw;
  const auto widths = [=](int64_t j) __attribute__((always_inline)) { return M::load(raw + j * L); };
  const auto heights = [=](int64_t j) __attribute__((always_inline)) { return M::load(raw + (bins + j) * L); };
  const auto derivatives = [=](int64_t j) __attribute__((always_inline)) { return M::load(raw + (2 * bins + j) * L); };
  math::SplinePoint<M> point;
  const V x = M::load(scratch.x);
  const V bound = c.scaled ? M::load(scratch.bound) : V{};
  math::spline_locate<M, 0, true>(c, x, bound, widths, heights, derivatives, scratch.widths, scratch.heights, point);
  if constexpr (kBackward) {
    const V gradient = math::spline_gradients<M, 0, true>(
        c, point, M::load(scratch.grad_y), M::load(logdet), widths, heights, scratch.widths, scratch.heights,
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

template <class R>
struct SplineStorage {
  using Load = void (*)(const void*, int64_t stride, int64_t n, R*);
  using Store = void (*)(const R*, int64_t stride, int64_t n, void*);
  using LoadParameters = void (*)(const void*, int64_t element_stride, int64_t stride, int64_t count, int64_t n, R*);
  using StoreParameters = void (*)(const R*, int64_t element_stride, int64_t stride, int64_t count, int64_t n, void*);

  template <class S>
  static void load(const void* p, int64_t stride, int64_t n, R* out) {
    load_block(static_cast<const S*>(p), stride, n, out);
  }
  template <class S>
  static void store(const R* in, int64_t stride, int64_t n, void* p) {
    store_block(in, stride, n, static_cast<S*>(p));
  }
  template <class S>
  static void load_all(const void* p, int64_t element_stride, int64_t stride, int64_t count, int64_t n, R* out) {
    load_parameters(static_cast<const S*>(p), element_stride, stride, count, n, out);
  }
  template <class S>
  static void store_all(const R* in, int64_t element_stride, int64_t stride, int64_t count, int64_t n, void* p) {
    store_parameters(in, element_stride, stride, count, n, static_cast<S*>(p));
  }

  Load load_input, load_logdet;
  Store store_result, store_logdet;
  LoadParameters load_raw;
  StoreParameters store_raw;

  explicit SplineStorage(const coupling::SplineElements& e) {
    with_storage(e.type, [&](auto s) { load_input = load<decltype(s)>, store_result = store<decltype(s)>; });
    with_storage(e.logdet_type, [&](auto s) { load_logdet = load<decltype(s)>, store_logdet = store<decltype(s)>; });
    with_storage(e.parameter_type,
                 [&](auto s) { load_raw = load_all<decltype(s)>, store_raw = store_all<decltype(s)>; });
  }
};

// Bounds of the elements first, first + 1, ...; lanes behind the n-th repeat it.
template <class R>
void load_bounds(const coupling::SplineElements& e, int64_t first, int64_t n, R* out) {
  const coupling::SplineBounds& bounds = e.bounds;
  int64_t row = first / bounds.n, within = first - row * bounds.n, start[1];
  bounds.rows.offsets(row, start);
  for (int64_t i = 0; i < SplineScratch<R>::L; ++i) {
    const int64_t at = start[0] + within * bounds.stride;
    out[i] = e.logdet_type == Storage::f64 ? R(static_cast<const double*>(bounds.data)[at])
                                           : R(static_cast<const float*>(bounds.data)[at]);
    if (i >= n - 1 || ++within < bounds.n) continue;
    within = 0;
    bounds.rows.offsets(++row, start);
  }
}

// Elements [begin, end), a unit of samples.
template <class R, bool kBackward>
void spline_unit(const coupling::SplineElements& e, const coupling::Spline<R>& c, const SplineStorage<R>& storage,
                 const SplineScratch<R>& scratch, int64_t begin, int64_t end) {
  using namespace coupling;
  constexpr int64_t L = SplineScratch<R>::L;
  constexpr int64_t kAhead = 2;  // blocks
  const int64_t bins = c.bins, counts[] = {bins, bins, c.derivatives()};
  if (kBackward && e.summed) {
    for (int64_t i = begin; i < end;) {
      const int64_t sample = i / e.sample_size, stop = std::min(end, (sample + 1) * e.sample_size);
      R g;
      storage.load_logdet(static_cast<const char*>(e.sample_logdet) + sample * storage_bytes(e.logdet_type), 0, 1,
                          scratch.x);
      g = scratch.x[0];
      for (; i < stop; ++i) scratch.logdet[i - begin] = g;
    }
  }
  for (int64_t i = begin; i < end;) {
    const int64_t row = i / e.n, first = i - row * e.n, stop = std::min(e.n, first + (end - i));
    int64_t offsets[kSplineOperands];
    e.rows.offsets(row, offsets);
    const auto at = [&](int k, int64_t element) {
      const Storage type = k >= kWidths && k <= kGradDerivatives ? e.parameter_type
                           : k == kLogdet                        ? e.logdet_type
                                                                 : e.type;
      return static_cast<char*>(e.data[k]) + (offsets[k] + element * e.stride[k]) * storage_bytes(type);
    };
    const auto parameters = [&](int first_operand, bool packed, const auto& each) {
      if (packed) return each(first_operand, 0, scratch.parameters);
      int64_t before = 0;
      for (int k = 0; k < 3; ++k) {
        each(first_operand + k, before, counts[k]);
        before += counts[k];
      }
    };
    for (int64_t j = first; j < stop; j += L) {
      const int64_t n = std::min(L, stop - j);
      R* const logdet = scratch.logdet + (i - begin) + (j - first);
      storage.load_input(at(kInput, j), e.stride[kInput], n, scratch.x);
      if (c.scaled) load_bounds(e, i + (j - first), n, scratch.bound);
      parameters(kWidths, e.packed, [&](int k, int64_t before, int64_t count) {
        storage.load_raw(at(k, j), e.stride[k], e.parameter_stride[k], count, n, scratch.raw + before * L);
        if (e.parameter_stride[k] == 1 && j + (kAhead + 1) * L <= stop)  // a block takes longer than loads may wait
          prefetch(at(k, j + kAhead * L), L * e.stride[k] * storage_bytes(e.parameter_type));
      });
      if constexpr (kBackward) {
        storage.load_input(at(kGradOutput, j), e.stride[kGradOutput], n, scratch.grad_y);
        if (!e.summed) storage.load_logdet(at(kLogdet, j), e.stride[kLogdet], n, logdet);
      }
      spline_block<R, kBackward>(c, scratch, logdet);
      storage.store_result(scratch.y, e.stride[kResult], n, at(kResult, j));
      if constexpr (kBackward) {
        parameters(kGradWidths, e.grads_packed, [&](int k, int64_t before, int64_t count) {
          storage.store_raw(scratch.raw + before * L, e.stride[k], e.parameter_stride[k], count, n, at(k, j));
        });
      } else if (!e.summed) {
        storage.store_logdet(logdet, e.stride[kLogdet], n, at(kLogdet, j));
      }
    }
    i += stop - first;
  }
}

// The forward leaves in partials[unit] the sum of a unit that is a piece of a sample.
template <class R, bool kBackward, class Parallel>
void spline(const coupling::SplineElements& e, const coupling::Spline<R>& c, double* partials,
            const Parallel& parallel) {
  const int64_t bins = c.bins, count = 2 * bins + c.derivatives();
  const SampleUnits units = e.summed ? SampleUnits(e.samples, e.sample_size) : SampleUnits(1, e.count);
  const SplineStorage<R> storage(e);
  parallel(units.count, 2, SplineScratch<R>::bytes(bins, count), [&](int64_t first, int64_t last, void* memory) {
    const SplineScratch<R> scratch(bins, count, memory);
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t begin = units.begin(unit), end = units.end(unit);
      spline_unit<R, kBackward>(e, c, storage, scratch, begin, end);
      if (kBackward || !e.summed) continue;
      if (units.pieces > 1) {
        partials[unit] = ordered_sum(scratch.logdet, end - begin);
        continue;
      }
      const int64_t sample = units.first_sample(unit), samples = e.sample_size ? (end - begin) / e.sample_size : 0;
      for (int64_t s = 0; s < samples; ++s) {
        const R sum = R(ordered_sum(scratch.logdet + s * e.sample_size, e.sample_size));
        scratch.x[0] = sum;
        storage.store_logdet(scratch.x, 1, 1,
                             static_cast<char*>(e.sample_logdet) + (sample + s) * storage_bytes(e.logdet_type));
      }
    }
  });
  if (kBackward || !e.summed || units.pieces == 1) return;
  for (int64_t s = 0; s < e.samples; ++s) {
    R sum[SplineScratch<R>::L] = {R(ordered_sum(partials + s * units.pieces, units.pieces))};
    storage.store_logdet(sum, 1, 1, static_cast<char*>(e.sample_logdet) + s * storage_bytes(e.logdet_type));
  }
}
