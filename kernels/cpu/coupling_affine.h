// Affine couplings on a CPU. Stamped once for each SIMD level (simd_levels.h); prelude: that of elements.h,
// ../math/coupling_affine_call.h, ../common/sample_units.h.
//
// A unit of at most SampleUnits::kElements elements goes through one loop, which uses operands in place where they lie
// as it wants them, and else from the L1 cache.
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

  // In order: visit(offset of the operand, elements before, elements of a row, rows, elements from one to the next).
  template <class Visit>
  PYPERF_HD void runs(int k, const Visit& visit) const {
    const int inner = call.rows.dims - 1;
    const int64_t pitch = inner >= 0 ? call.rows.stride[k][inner] : 0;
    int64_t neighbours = inner >= 0 ? call.rows.size[inner] - row % call.rows.size[inner] : 1;
    int64_t start = offset[k], r = row, done = std::min(call.n - at, count);
    visit(start + at * call.stride[k], 0, done, 1, pitch);
    for (start += pitch, ++r, --neighbours; done < count;) {
      if (neighbours == 0) {
        int64_t offsets[N];
        call.rows.offsets(r, offsets);
        start = offsets[k], neighbours = call.rows.size[inner];
      }
      const int64_t left = count - done, whole = std::min(left / call.n, neighbours);
      const int64_t length = whole ? call.n : left, rows = whole ? whole : 1;
      visit(start, done, length, rows, pitch);
      done += length * rows, start += pitch * rows, r += rows, neighbours -= rows;
    }
  }
};

template <class V, size_t... kLane>
PYPERF_HD V even_lanes(V low, V high, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(low, high, int(2 * kLane)...);
}

// Writes whole vectors, up to kLanes - 1 elements too many.
template <class R, class S>
PYPERF_HD void load_run(const S* from, int64_t stride, int64_t n, R* to) {
  constexpr int L = VectorMachine<R>::kLanes;
  int64_t i = 0;
  if (stride == 1) {
    for (; i + L <= n; i += L) {
      const auto v = load_lanes<R, L>(from + i);
      memcpy(to + i, &v, sizeof v);
    }
    if constexpr (std::is_same_v<S, R>) {
      using M = VectorMachine<R>;
      if (i < n) M::store(to + i, M::load_first(from + i, n - i));
      return;
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

// Reads whole vectors.
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
    if constexpr (std::is_same_v<S, R>) {
      using M = VectorMachine<R>;
      if (i < n) M::store_first(to + i, M::load(from + i), n - i);
      return;
    }
  }
  for (; i < n; ++i) to[i * stride] = stored<S>(from[i]);
}

// Rows of n elements each, next to each other in `to`.
template <class R, class S>
PYPERF_HD void load_runs(const S* from, int64_t stride, int64_t n, int64_t rows, int64_t pitch, R* to) {
  using M = VectorMachine<R>;
  if constexpr (std::is_same_v<S, R>) {
    if (stride == 1 && n < M::kLanes) {
      for (int64_t r = 0; r < rows; ++r, from += pitch, to += n) M::store(to, M::load_first(from, n));
      return;
    }
  }
  for (int64_t r = 0; r < rows; ++r, from += pitch, to += n) load_run(from, stride, n, to);
}
template <class R, class S>
PYPERF_HD void store_runs(const R* from, int64_t stride, int64_t n, int64_t rows, int64_t pitch, S* to) {
  using M = VectorMachine<R>;
  if constexpr (std::is_same_v<S, R>) {
    if (stride == 1 && n < M::kLanes) {
      for (int64_t r = 0; r < rows; ++r, from += n, to += pitch) M::store_first(to, M::load(from), n);
      return;
    }
  }
  for (int64_t r = 0; r < rows; ++r, from += n, to += pitch) store_run(from, stride, n, to);
}

template <class R, class S, int N>
void load_piece(const AffinePiece<N>& piece, int k, R* to) {
  const S* const data = static_cast<const S*>(piece.call.data[k]);
  const int64_t stride = piece.call.stride[k];
  piece.runs(k, [=](int64_t offset, int64_t done, int64_t n, int64_t rows, int64_t pitch)
                    __attribute__((always_inline)) { load_runs(data + offset, stride, n, rows, pitch, to + done); });
}
template <class R, class S, int N>
void store_piece(const AffinePiece<N>& piece, int k, const R* from) {
  S* const data = static_cast<S*>(piece.call.data[k]);
  const int64_t stride = piece.call.stride[k];
  piece.runs(k, [=](int64_t offset, int64_t done, int64_t n, int64_t rows, int64_t pitch)
                    __attribute__((always_inline)) { store_runs(from + done, stride, n, rows, pitch, data + offset); });
}

// An operand as the loops see it: rows of whole vectors.
template <class R>
struct VectorRows {
  R* data;
  int64_t pitch;

  PYPERF_HD R* row(int64_t r) const { return data + r * pitch; }
};

// Whether rows are used in place, several in one call; shorter ones are put together.
template <class R, int N>
bool has_vector_rows(const coupling::AffineCall<N>& call) {
  constexpr int64_t L = VectorMachine<R>::kLanes;
  return call.n % L == 0 && call.n >= 2 * L;
}

// A piece as the loops see it: `rows` of `length` each, in place or in memory of their own, [kOperands, kStaged].
template <class R, int N>
struct AffineTile {
  static constexpr int64_t L = VectorMachine<R>::kLanes;
  AffinePiece<N> piece;
  R* memory;
  int64_t room;  // elements of each operand's memory
  int64_t rows, length;

  AffineTile(const coupling::AffineCall<N>& call, int64_t first, int64_t count, R* memory, int64_t room)
      : piece(call, first, count), memory(memory), room(room) {
    rows = has_vector_rows<R>(call) && count > call.n ? count / call.n : 1;
    length = rows > 1 ? call.n : (count + L - 1) / L * L;
  }

  int64_t padded() const { return rows * length; }
  bool in_place(int k) const {
    const auto& call = piece.call;
    return call.stride[k] == 1 && storage_bytes(call.type[k]) == sizeof(R) &&
           (rows > 1 || (length == piece.count && piece.at + length <= call.n));
  }
  VectorRows<R> place(int k) const {
    if (!in_place(k)) return {memory + k * room, length};
    const auto& call = piece.call;
    return {static_cast<R*>(call.data[k]) + piece.offset[k] + piece.at,
            call.rows.dims ? call.rows.stride[k][call.rows.dims - 1] : 0};
  }
  VectorRows<const R> input(int k) const {
    const VectorRows<R> to = place(k);
    if (!in_place(k)) {
      if constexpr (sizeof(R) == 8) {
        load_piece<R, double>(piece, k, to.data);
      } else {
        if (piece.call.type[k] == Storage::f32) load_piece<R, float>(piece, k, to.data);
        if (piece.call.type[k] == Storage::f16) load_piece<R, Float16>(piece, k, to.data);
        if (piece.call.type[k] == Storage::bf16) load_piece<R, BFloat16>(piece, k, to.data);
      }
      for (int64_t i = piece.count; i < padded(); ++i) to.data[i] = 0;
    }
    return {to.data, to.pitch};
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
struct ForwardOperands {
  VectorRows<const R> x, u, shift;
  VectorRows<R> y, logdet;
};
template <class R>
struct GradientOperands {
  VectorRows<const R> grad_y, grad_logdet, x, u, shift;
  VectorRows<R> grad_x, grad_scale, grad_shift;
};

// Fetches what comes later: rows may be too short for the processor to see it.
template <class R>
PYPERF_HD void prefetch_ahead(const R* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + 4096);
}

template <class R, coupling::Activation kActivation, bool kBefore>
__attribute__((noinline)) void affine_pass(const coupling::Affine& how, int64_t rows, int64_t n,
                                           const ForwardOperands<R>& o) {
  using M = VectorMachine<R>;
  const math::AffineConstants<R> c(how);
  for (int64_t r = 0; r < rows; ++r) {
    const R *const x = o.x.row(r), *const us = o.u.row(r), *const shift = o.shift.row(r);
    R *const y = o.y.row(r), *const logdets = o.logdet.row(r);
    for (int64_t i = 0; i < n; i += M::kLanes) {
      typename M::V logdet, factor, exponent, slope;
      prefetch_ahead(us + i), prefetch_ahead(x + i), prefetch_ahead(shift + i);
      math::scale_of<M, kActivation>(c, M::load(us + i), logdet, factor, exponent, slope);
      M::store(y + i, math::affine_value<M, kBefore>(c, M::load(x + i), M::load(shift + i), factor, exponent));
      M::store(logdets + i, logdet);
    }
  }
}

template <class R, coupling::Activation kActivation, bool kBefore>
__attribute__((noinline)) void affine_pass(const coupling::Affine& how, int64_t rows, int64_t n,
                                           const GradientOperands<R>& o) {
  using M = VectorMachine<R>;
  const math::AffineConstants<R> c(how);
  for (int64_t r = 0; r < rows; ++r) {
    const R *const grad_ys = o.grad_y.row(r), *const grad_logdets = o.grad_logdet.row(r), *const x = o.x.row(r),
                   *const us = o.u.row(r), *const shift = o.shift.row(r);
    R *const grad_xs = o.grad_x.row(r), *const grad_scales = o.grad_scale.row(r),
             *const grad_shifts = o.grad_shift.row(r);
    for (int64_t i = 0; i < n; i += M::kLanes) {
      typename M::V logdet, factor, exponent, slope, grad_x, grad_scale, grad_shift;
      prefetch_ahead(us + i), prefetch_ahead(x + i), prefetch_ahead(grad_ys + i);
      math::scale_of<M, kActivation>(c, M::load(us + i), logdet, factor, exponent, slope);
      math::affine_gradients<M, kBefore>(c, M::load(grad_ys + i), M::load(grad_logdets + i), M::load(x + i),
                                         M::load(shift + i), factor, exponent, slope, grad_x, grad_scale, grad_shift);
      M::store(grad_xs + i, grad_x);
      M::store(grad_scales + i, grad_scale);
      M::store(grad_shifts + i, grad_shift);
    }
  }
}

template <class Operands>
using AffinePass = void (*)(const coupling::Affine&, int64_t rows, int64_t n, const Operands&);

template <class R, template <class> class Operands>
AffinePass<Operands<R>> affine_pass_of(const coupling::Affine& how) {
  using coupling::Activation;
  using Pass = AffinePass<Operands<R>>;
  const auto of = [&](auto activation) -> Pass {
    constexpr Activation kActivation = decltype(activation)::value;
    if (how.shift_before) return &affine_pass<R, kActivation, true>;
    return &affine_pass<R, kActivation, false>;
  };
  switch (how.activation) {
    case Activation::none: return of(std::integral_constant<Activation, Activation::none>());
    case Activation::exp: return of(std::integral_constant<Activation, Activation::exp>());
    case Activation::sigmoid: return of(std::integral_constant<Activation, Activation::sigmoid>());
    case Activation::softplus: return of(std::integral_constant<Activation, Activation::softplus>());
    case Activation::tanh: return of(std::integral_constant<Activation, Activation::tanh>());
    case Activation::atan: return of(std::integral_constant<Activation, Activation::atan>());
    case Activation::sigmoid_floor: return of(std::integral_constant<Activation, Activation::sigmoid_floor>());
    case Activation::softplus_floor: return of(std::integral_constant<Activation, Activation::softplus_floor>());
    default: return of(std::integral_constant<Activation, Activation::softclip>());
  }
}

// ---- units ----

// visit(first, elements): whole rows where those are used in place, as many as lie alike, else whole vectors.
template <class R, int N, class Visit>
PYPERF_HD void in_tiles(const coupling::AffineCall<N>& call, int64_t begin, int64_t end, int64_t longest,
                        const Visit& visit) {
  constexpr int64_t L = VectorMachine<R>::kLanes;
  const int inner = call.rows.dims - 1;
  while (begin < end) {
    int64_t n = std::min(longest, end - begin);
    if (has_vector_rows<R>(call)) {
      const int64_t row = begin / call.n, to_end = (row + 1) * call.n - begin;
      if (to_end < call.n || n < call.n)
        n = std::min(n, to_end);
      else if (inner >= 0)
        n = std::min(n / call.n, call.rows.size[inner] - row % call.rows.size[inner]) * call.n;
    }
    if (n >= 8 * L) n = n / L * L;
    visit(begin, n);
    begin += n;
  }
}

template <class R>
struct AffineScratch {
  static constexpr int64_t kLanes = VectorMachine<R>::kLanes;
  static constexpr int64_t kBackwardTile = 512;  // elements; more operands share the cache
  static constexpr int64_t kForward = SampleUnits::kElements + kLanes,
                           kBackward = kBackwardTile + kLanes;  // of an operand
  static constexpr int64_t kForwardBytes = (coupling::kForwardOperands + 1) * kForward * int64_t(sizeof(R));
  static constexpr int64_t kBackwardBytes = coupling::kBackwardOperands * kBackward * int64_t(sizeof(R));
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
void affine_unit(const coupling::AffineCall<coupling::kForwardOperands>& call, AffinePass<ForwardOperands<R>> pass,
                 int64_t begin, int64_t end, R* memory, R* logdet) {
  using namespace coupling;
  in_tiles<R>(call, begin, end, SampleUnits::kElements, [&](int64_t first, int64_t count) {
    const AffineTile<R, kForwardOperands> tile(call, first, count, memory, AffineScratch<R>::kForward);
    ForwardOperands<R> o;
    o.x = tile.input(kX), o.shift = tile.input(kShift);
    o.u = call.how.activation == Activation::none ? o.x : tile.input(kScale);
    o.y = tile.place(kY);
    o.logdet = call.summed ? VectorRows<R>{logdet + (first - begin), tile.length} : tile.place(kLogdet);
    pass(call.how, tile.rows, tile.length, o);
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
  const bool summing = call.summed && call.how.activation != Activation::none;
  if (call.summed && !summing) std::fill_n(sums, call.samples, R(0));
  const auto pass = affine_pass_of<R, ForwardOperands>(call.how);
  parallel(units.count, 16, Scratch::kForwardBytes, [&](int64_t first, int64_t last, void* scratch) {
    R* const memory = static_cast<R*>(scratch);
    R* const logdet = memory + kForwardOperands * Scratch::kForward;
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t begin = units.begin(unit), end = units.end(unit);
      affine_unit(call, pass, begin, end, memory, logdet);
      if (!summing) continue;
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
  if (!summing || units.pieces == 1) return;
  for (int64_t s = 0; s < call.samples; ++s) sums[s] = R(ordered_sum(partials + s * units.pieces, units.pieces));
}

template <class R, class Parallel>
void affine_backward(const coupling::AffineCall<coupling::kBackwardOperands>& call, const Parallel& parallel) {
  using namespace coupling;
  using Scratch = AffineScratch<R>;
  constexpr int64_t kTile = Scratch::kBackwardTile;
  const R* const of_samples = static_cast<const R*>(call.data[kGradLogdet]);
  const int64_t elements = call.elements();
  const auto pass = affine_pass_of<R, GradientOperands>(call.how);
  parallel((elements + kTile - 1) / kTile, 16, Scratch::kBackwardBytes, [&](int64_t from, int64_t to, void* scratch) {
    R* const memory = static_cast<R*>(scratch);
    in_tiles<R>(call, from * kTile, std::min(to * kTile, elements), kTile, [&](int64_t first, int64_t count) {
      const AffineTile<R, kBackwardOperands> tile(call, first, count, memory, Scratch::kBackward);
      GradientOperands<R> o;
      o.grad_y = tile.input(kGradY), o.x = tile.input(kOfX);
      o.shift = call.how.shift_before ? tile.input(kOfShift) : o.x;
      if (call.summed) {
        R* const spread = memory + kGradLogdet * Scratch::kBackward;
        const int64_t end = first + count;
        for (int64_t i = first, sample = first / call.sample_size; i < end; ++sample) {
          const R grad = of_samples[sample];
          const int64_t stop = std::min(end, (sample + 1) * call.sample_size);
          for (; i < stop; ++i) spread[i - first] = grad;
        }
        for (int64_t i = count; i < tile.padded(); ++i) spread[i] = 0;
        o.grad_logdet = {spread, tile.length};
      } else {
        o.grad_logdet = tile.input(kGradLogdet);
      }
      o.u = call.how.activation == Activation::none ? o.x : tile.input(kOfScale);
      o.grad_x = tile.place(kGradX), o.grad_scale = tile.place(kGradScale), o.grad_shift = tile.place(kGradShift);
      pass(call.how, tile.rows, tile.length, o);
      tile.finish(kGradX), tile.finish(kGradScale), tile.finish(kGradShift);
    });
  });
}
