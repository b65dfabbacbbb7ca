// Affine couplings on a CPU. Stamped once for each SIMD level (simd_levels.h); prelude: that of elements.h,
// ../math/coupling_affine_call.h, ../common/sample_units.h.
//
// A unit of at most SampleUnits::kElements elements goes through the L1 cache in passes of one loop each: scales and
// log-dets of one activation, then the coupling. Operands that lie as the loops want them are used in place.
#include "elements.h"
//
#include "../math/coupling_affine.h"

// ---- operands ----

// Elements [first, first + count) of the operands of a call.
template <int N>
struct AffinePiece {
  const coupling::AffineCall<N>& call;
  int64_t count, row, at;  // the first element's row, and where it is in there
  int64_t offset[N];       // of the row

  AffinePiece(const coupling::AffineCall<N>& call, int64_t first, int64_t count) : call(call), count(count) {
    row = call.rows.count > 1 ? first / call.n : 0;
    at = first - row * call.n;
    call.rows.offsets(row, offset);
  }

  // Runs of neighbours within a row: visit(offset of the operand, elements before, elements).
  template <class Visit>
  PYPERF_HD void runs(int k, const Visit& visit) const {
    const int inner = call.rows.dims - 1;
    int64_t start = offset[k], from = at, r = row, done = 0;
    int64_t neighbours = inner >= 0 ? call.rows.size[inner] - r % call.rows.size[inner] : 1;
    while (true) {
      const int64_t length = std::min(call.n - from, count - done);
      visit(start + from * call.stride[k], done, length);
      done += length;
      if (done == count) return;
      from = 0, ++r;
      if (--neighbours > 0) {
        start += call.rows.stride[k][inner];
      } else {
        int64_t offsets[N];
        call.rows.offsets(r, offsets);
        start = offsets[k];
        neighbours = call.rows.size[inner];
      }
    }
  }
};

template <class V, size_t... kLane>
PYPERF_HD V even_lanes(V low, V high, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(low, high, int(2 * kLane)...);
}

template <class R, class S>
PYPERF_HD void load_run(const S* from, int64_t stride, int64_t n, R* to) {
  constexpr int L = VectorMachine<R>::kLanes;
  int64_t i = 0;
  if (stride == 1) {
    for (; i + L <= n; i += L) {
      const auto v = load_lanes<R, L>(from + i);
      memcpy(to + i, &v, sizeof v);
    }
  } else if constexpr (std::is_same_v<S, R>) {
    for (; stride == 2 && i + L < n; i += L) {  // reads the element behind each, which is there but for the last
      LanesOf<R, L> low, high;
      memcpy(&low, from + 2 * i, sizeof low);
      memcpy(&high, from + 2 * i + L, sizeof high);
      const auto even = even_lanes(low, high, std::make_index_sequence<L>());
      memcpy(to + i, &even, sizeof even);
    }
  }
  for (; i < n; ++i) to[i] = loaded<R>(from[i * stride]);
}

template <class R, class S>
PYPERF_HD void store_run(const R* from, int64_t stride, int64_t n, S* to) {
  constexpr int L = VectorMachine<R>::kLanes;
  int64_t i = 0;
  if (stride == 1) {
    for (; i + L <= n; i += L) {
      LanesOf<R, L> v;
      memcpy(&v, from + i, sizeof v);
      store_lanes<L, R>(v, to + i);
    }
  }
  for (; i < n; ++i) to[i * stride] = stored<S>(from[i]);
}

template <class R, class S, int N>
void load_piece(const AffinePiece<N>& piece, int k, R* to) {
  const S* const data = static_cast<const S*>(piece.call.data[k]);
  const int64_t stride = piece.call.stride[k];
  piece.runs(k, [=](int64_t offset, int64_t done, int64_t n)
                    __attribute__((always_inline)) { load_run(data + offset, stride, n, to + done); });
}
template <class R, class S, int N>
void store_piece(const AffinePiece<N>& piece, int k, const R* from) {
  S* const data = static_cast<S*>(piece.call.data[k]);
  const int64_t stride = piece.call.stride[k];
  piece.runs(k, [=](int64_t offset, int64_t done, int64_t n)
                    __attribute__((always_inline)) { store_run(from + done, stride, n, data + offset); });
}

// A piece as the loops see it: whole vectors of R, in place or in memory of their own, [kOperands, kStaged].
template <class R, int N>
struct AffineTile {
  static constexpr int64_t L = VectorMachine<R>::kLanes;
  AffinePiece<N> piece;
  R* memory;
  int64_t room;  // elements of each operand's memory
  int64_t padded;

  AffineTile(const coupling::AffineCall<N>& call, int64_t first, int64_t count, R* memory, int64_t room)
      : piece(call, first, count), memory(memory), room(room), padded((count + L - 1) / L * L) {}

  bool in_place(int k) const {
    const auto& call = piece.call;
    return padded == piece.count && piece.at + piece.count <= call.n && call.stride[k] == 1 &&
           storage_bytes(call.type[k]) == sizeof(R);
  }
  R* place(int k) const {
    if (in_place(k)) return static_cast<R*>(piece.call.data[k]) + piece.offset[k] + piece.at;
    return memory + k * room;
  }
  const R* input(int k) const {
    R* const to = place(k);
    if (in_place(k)) return to;
    if constexpr (sizeof(R) == 8) {
      load_piece<R, double>(piece, k, to);
    } else {
      if (piece.call.type[k] == Storage::f32) load_piece<R, float>(piece, k, to);
      if (piece.call.type[k] == Storage::f16) load_piece<R, Float16>(piece, k, to);
      if (piece.call.type[k] == Storage::bf16) load_piece<R, BFloat16>(piece, k, to);
    }
    for (int64_t i = piece.count; i < padded; ++i) to[i] = 0;
    return to;
  }
  void finish(int k) const {
    if (in_place(k)) return;
    const R* const from = memory + k * room;
    if constexpr (sizeof(R) == 8) {
      store_piece<R, double>(piece, k, from);
    } else {
      if (piece.call.type[k] == Storage::f32) store_piece<R, float>(piece, k, from);
      if (piece.call.type[k] == Storage::f16) store_piece<R, Float16>(piece, k, from);
      if (piece.call.type[k] == Storage::bf16) store_piece<R, BFloat16>(piece, k, from);
    }
  }
};

// ---- passes ----

template <class R>
struct ScaleParts {
  R *logdet, *factor, *exponent, *slope;
};

// What the next pass reads is fetched while this one computes.
template <class R, coupling::Activation kActivation, bool kSlope>
__attribute__((noinline)) void scale_pass(const coupling::Affine& how, int64_t n, const R* u, const R* next,
                                          const R* after, const ScaleParts<R>& to) {
  using M = VectorMachine<R>;
  const math::AffineConstants<R> c(how);
  R *const logdets = to.logdet, *const factors = to.factor, *const exponents = to.exponent, *const slopes = to.slope;
  for (int64_t i = 0; i < n; i += M::kLanes) {
    typename M::V logdet, factor, exponent, slope;
    __builtin_prefetch(next + i);
    __builtin_prefetch(after + i);
    math::scale_of<M, kActivation>(c, M::load(u + i), logdet, factor, exponent, slope);
    if constexpr (!kSlope) M::store(logdets + i, logdet);
    M::store(factors + i, factor);
    M::store(exponents + i, exponent);
    if constexpr (kSlope) M::store(slopes + i, slope);
  }
}

template <class R, bool kSlope>
void scales(const coupling::Affine& how, int64_t n, const R* u, const R* next, const R* after,
            const ScaleParts<R>& to) {
  using coupling::Activation;
  switch (how.activation) {
    case Activation::none: return scale_pass<R, Activation::none, kSlope>(how, n, u, next, after, to);
    case Activation::exp: return scale_pass<R, Activation::exp, kSlope>(how, n, u, next, after, to);
    case Activation::sigmoid: return scale_pass<R, Activation::sigmoid, kSlope>(how, n, u, next, after, to);
    case Activation::softplus: return scale_pass<R, Activation::softplus, kSlope>(how, n, u, next, after, to);
    case Activation::tanh: return scale_pass<R, Activation::tanh, kSlope>(how, n, u, next, after, to);
    case Activation::atan: return scale_pass<R, Activation::atan, kSlope>(how, n, u, next, after, to);
    case Activation::softclip: return scale_pass<R, Activation::softclip, kSlope>(how, n, u, next, after, to);
  }
}

template <class R, bool kBefore>
__attribute__((noinline)) void value_pass(const coupling::Affine& how, int64_t n, const R* x, const R* shift,
                                          const ScaleParts<R>& scale, R* y) {
  using M = VectorMachine<R>;
  const math::AffineConstants<R> c(how);
  const R *const factors = scale.factor, *const exponents = scale.exponent;
  for (int64_t i = 0; i < n; i += M::kLanes)
    M::store(y + i, math::affine_value<M, kBefore>(c, M::load(x + i), M::load(shift + i), M::load(factors + i),
                                                   M::load(exponents + i)));
}

template <class R>
struct GradientOperands {
  const R *grad_y, *grad_logdet, *x, *shift;
  R *grad_x, *grad_scale, *grad_shift;
};

template <class R, bool kBefore>
__attribute__((noinline)) void gradient_pass(const coupling::Affine& how, int64_t n, const GradientOperands<R>& o,
                                             const ScaleParts<R>& scale) {
  using M = VectorMachine<R>;
  const math::AffineConstants<R> c(how);
  const GradientOperands<R> at = o;
  const ScaleParts<R> s = scale;
  for (int64_t i = 0; i < n; i += M::kLanes) {
    typename M::V grad_x, grad_scale, grad_shift;
    math::affine_gradients<M, kBefore>(c, M::load(at.grad_y + i), M::load(at.grad_logdet + i), M::load(at.x + i),
                                       M::load(at.shift + i), M::load(s.factor + i), M::load(s.exponent + i),
                                       M::load(s.slope + i), grad_x, grad_scale, grad_shift);
    M::store(at.grad_x + i, grad_x);
    M::store(at.grad_scale + i, grad_scale);
    M::store(at.grad_shift + i, grad_shift);
  }
}

// ---- units ----

// Whole vectors first, for operands that are used in place.
template <class R, class Visit>
PYPERF_HD void in_tiles(int64_t begin, int64_t end, int64_t longest, const Visit& visit) {
  constexpr int64_t L = VectorMachine<R>::kLanes;
  while (begin < end) {
    int64_t n = std::min(longest, end - begin);
    if (n >= 8 * L) n = n / L * L;
    visit(begin, n);
    begin += n;
  }
}

template <class R>
struct AffineScratch {
  static constexpr int64_t kLanes = VectorMachine<R>::kLanes;
  static constexpr int64_t kForward = SampleUnits::kElements + kLanes;  // elements of an operand
  static constexpr int64_t kBackwardTile = 512;                         // more operands share the cache
  static constexpr int64_t kForwardBytes = (coupling::kForwardOperands + 3) * kForward * int64_t(sizeof(R));
  static constexpr int64_t kBackwardBytes = (coupling::kBackwardOperands + 3) * kBackwardTile * int64_t(sizeof(R));
};

// Sums of small samples, each as ordered_sum has it.
template <int n, class R>
void sums_of(const R* v, int64_t samples, R* sums) {
  for (int64_t s = 0; s < samples; ++s, v += n) {
    double lanes[n];
    for (int i = 0; i < n; ++i) lanes[i] = 0.0 + double(v[i]);
    for (int half = 8; half > 0; half /= 2)
      for (int i = 0; i < half && i + half < n; ++i) lanes[i] += lanes[i + half];
    sums[s] = R(lanes[0]);
  }
}
template <int n, class R>
void sums_of_small(const R* v, int64_t size, int64_t samples, R* sums) {
  if (n == size) return sums_of<n>(v, samples, sums);
  if constexpr (n > 1) sums_of_small<n - 1>(v, size, samples, sums);
}

// Log-dets are left in `logdet`, [SampleUnits::kElements + lanes], where they are summed.
template <class R>
void affine_unit(const coupling::AffineCall<coupling::kForwardOperands>& call, int64_t begin, int64_t end, R* memory) {
  using namespace coupling;
  using Scratch = AffineScratch<R>;
  R* const parts = memory + kForwardOperands * Scratch::kForward;
  R* const summed = parts + 2 * Scratch::kForward;
  in_tiles<R>(begin, end, SampleUnits::kElements, [&](int64_t first, int64_t count) {
    const AffineTile<R, kForwardOperands> tile(call, first, count, memory, Scratch::kForward);
    const R *const x = tile.input(kX), *const shift = tile.input(kShift);
    const R* const u = call.how.activation == Activation::none ? x : tile.input(kScale);
    const ScaleParts<R> scale{call.summed ? summed + (first - begin) : tile.place(kLogdet), parts,
                              parts + Scratch::kForward, nullptr};
    R* const y = tile.place(kY);
    scales<R, false>(call.how, tile.padded, u, x, shift, scale);
    (call.how.shift_before ? value_pass<R, true> : value_pass<R, false>)(call.how, tile.padded, x, shift, scale, y);
    tile.finish(kY);
    if (!call.summed) tile.finish(kLogdet);
  });
}

// partials[unit] gets the sum of a unit that is a piece of a sample.
template <class R, class Parallel>
void affine_forward(const coupling::AffineCall<coupling::kForwardOperands>& call, double* partials,
                    const Parallel& parallel) {
  using namespace coupling;
  using Scratch = AffineScratch<R>;
  const SampleUnits units = call.summed ? SampleUnits(call.samples, call.sample_size) : SampleUnits(1, call.elements());
  R* const sums = static_cast<R*>(call.data[kLogdet]);
  parallel(units.count, 16, Scratch::kForwardBytes, [&](int64_t first, int64_t last, void* scratch) {
    R* const memory = static_cast<R*>(scratch);
    const R* const logdet = memory + (kForwardOperands + 2) * Scratch::kForward;
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t begin = units.begin(unit), end = units.end(unit);
      affine_unit(call, begin, end, memory);
      if (!call.summed) continue;
      if (units.pieces > 1) {
        partials[unit] = ordered_sum(logdet, end - begin);
        continue;
      }
      const int64_t sample = units.first_sample(unit), samples = (end - begin) / call.sample_size;
      if (call.sample_size <= 16) {
        sums_of_small<16>(logdet, call.sample_size, samples, sums + sample);
        continue;
      }
      for (int64_t s = 0; s < samples; ++s)
        sums[sample + s] = R(ordered_sum(logdet + s * call.sample_size, call.sample_size));
    }
  });
  if (!call.summed || units.pieces == 1) return;
  for (int64_t s = 0; s < call.samples; ++s) sums[s] = R(ordered_sum(partials + s * units.pieces, units.pieces));
}

template <class R, class Parallel>
void affine_backward(const coupling::AffineCall<coupling::kBackwardOperands>& call, const Parallel& parallel) {
  using namespace coupling;
  using Scratch = AffineScratch<R>;
  constexpr int64_t kTile = Scratch::kBackwardTile;
  const R* const of_samples = static_cast<const R*>(call.data[kGradLogdet]);
  const int64_t elements = call.elements();
  parallel((elements + kTile - 1) / kTile, 16, Scratch::kBackwardBytes, [&](int64_t from, int64_t to, void* scratch) {
    R* const memory = static_cast<R*>(scratch);
    R* const parts = memory + kBackwardOperands * kTile;
    in_tiles<R>(from * kTile, std::min(to * kTile, elements), kTile, [&](int64_t first, int64_t count) {
      const AffineTile<R, kBackwardOperands> tile(call, first, count, memory, kTile);
      GradientOperands<R> o;
      o.grad_y = tile.input(kGradY), o.x = tile.input(kOfX), o.shift = tile.input(kOfShift);
      if (call.summed) {
        R* const spread = memory + kGradLogdet * kTile;
        const int64_t end = first + count;
        for (int64_t i = first, sample = first / call.sample_size; i < end; ++sample) {
          const R grad = of_samples[sample];
          const int64_t stop = std::min(end, (sample + 1) * call.sample_size);
          for (; i < stop; ++i) spread[i - first] = grad;
        }
        for (int64_t i = count; i < tile.padded; ++i) spread[i] = 0;
        o.grad_logdet = spread;
      } else {
        o.grad_logdet = tile.input(kGradLogdet);
      }
      const R* const u = call.how.activation == Activation::none ? o.x : tile.input(kOfScale);
      o.grad_x = tile.place(kGradX), o.grad_scale = tile.place(kGradScale), o.grad_shift = tile.place(kGradShift);
      const ScaleParts<R> scale{nullptr, parts, parts + kTile, parts + 2 * kTile};
      scales<R, true>(call.how, tile.padded, u, o.x, o.grad_y, scale);
      (call.how.shift_before ? gradient_pass<R, true> : gradient_pass<R, false>)(call.how, tile.padded, o, scale);
      tile.finish(kGradX), tile.finish(kGradScale), tile.finish(kGradShift);
    });
  });
}
