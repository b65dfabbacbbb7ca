// The monotone rational-quadratic spline of Durkan et al. (2019), for one value of a machine: an element, or a vector
// of them. Stamped like elementary.h, after it; prelude: coupling.h, <utility>.
//
// Every sum has terms of one sign, bins are sized directly and not as differences of knots, and the last bin is
// measured from the end of the box: so the log-determinant stays right where slopes are steep, and no finite input
// gives NaN.
namespace math {

// f(from), ..., f(count - 1); kCount: the same number, or 0 where it is known at run time. Not left to the compilers,
// of which not all unroll long bodies.
template <int kFrom, class F, int... kStep>
PYPERF_HD void each_of(const F& f, std::integer_sequence<int, kStep...>) {
  (f(kFrom + kStep), ...);
}
template <int kFrom, int kCount, class F>
PYPERF_HD void each(int count, const F& f) {
  if constexpr (kCount > 0) {
    each_of<kFrom>(f, std::make_integer_sequence<int, kCount - kFrom>());
  } else {
    for (int j = kFrom; j < count; ++j) f(j);
  }
}

// A running sum in groups of 4, 16 and 64, so that its error is that of a few additions and not of all.
template <class M>
struct RunningSum {
  Value<M> by_4, by_16, by_64, large;
  Value<M> whole, before;  // of whole groups of 16 and of 4

  // The sum with the term; count: the terms so far, this one included. Nothing is added to 0: all wait for this.
  PYPERF_HD Value<M> add(Value<M> term, int count) {
    by_4 = count % 4 == 1 ? term : by_4 + term;
    if (count % 4) return count > 4 ? before + by_4 : by_4;
    by_16 = count % 16 == 4 ? by_4 : by_16 + by_4;
    before = count > 16 ? whole + by_16 : by_16;
    if (count % 16) return before;
    by_64 = count % 64 == 16 ? by_16 : by_64 + by_16;
    whole = count > 64 ? large + by_64 : by_64;
    if (count % 64 == 0) large = whole;
    return before = whole;
  }
};

// One side's softmax, and the bin: exponentials in front of it and its own, and what one unit of them is worth.
template <class M>
struct SplineSide {
  Value<M> before, own, per_unit, inverse_sum;
};

template <class M>
struct SplinePoint {
  using V = typename M::V;
  SplineSide<M> width, height;
  V k;                                  // the bin, as a number
  V x_edge, w, y_edge, h;               // its lower corner and its size
  V d0, d1, bend0, bend1;               // slopes at its ends, and their derivatives by the raw parameters
  V s, theta, phi;                      // h / w; how far the point is from both ends: theta + phi = 1
  V below, above, top;                  // slope = s^2 above / below^2, y = y_edge + h top / below
  V excess;                             // beyond the box, along x, not scaled
  V bound;                              // with its sign, where boxes are scaled; NaN where it bounds nothing
  typename M::Mask inside, last, high;  // high: beyond the upper corner
  typename M::Mask free0, free1;        // the slopes at the bin's ends are parameters, where tails are mixed
};

// At the corner that is nearer to a point beyond the box.
template <class M>
PYPERF_HD Value<M> edge_slope(const SplinePoint<M>& p) {
  return M::select(p.high, p.d1, p.d0);
}

// u / (1 + |u| / bend), and its derivative.
template <class M>
PYPERF_HD Value<M> soft_clipped(Value<M> u, typename M::R inverse_bend, Value<M>& derivative) {
  using R = typename M::R;
  const auto a = R(1) / (abs<M>(u) * inverse_bend + R(1));
  derivative = a * a;
  return u * a;
}

// e[j] = exp(logit j - the largest logit); returns their sum.
template <class M, int kBins, class Raw>
PYPERF_HD Value<M> spline_exponentials(const coupling::Spline<typename M::R>& c, const Raw& raw, Value<M>* e) {
  const int bins = kBins ? kBins : c.bins;
  const bool held = M::kLanes == 1 || c.exponential;  // a CPU reads raw logits again, a GPU has them in registers
  if (held) each<0, kBins>(bins, [&](int j) __attribute__((always_inline)) { e[j] = raw(j); });
  if (c.exponential) {
    Value<M> derivative;
    each<0, kBins>(bins, [&](int j) __attribute__((always_inline)) {
      e[j] = soft_clipped<M>(e[j], c.inverse_curve * typename M::R(2), derivative);
    });
  }
  const auto logit = [&](int j) __attribute__((always_inline)) { return held ? e[j] : raw(j); };
  auto largest = logit(0);
  each<1, kBins>(bins, [&](int j) __attribute__((always_inline)) { largest = M::larger(largest, logit(j)); });
  auto total = M::of(0);
  RunningSum<M> sum{total, total, total, total, total, total};
  each<0, kBins>(bins, [&](int j) __attribute__((always_inline)) {
    e[j] = exp_of_share<M>((logit(j) - largest) * c.logit_scale);
    total = sum.add(e[j], j + 1);
  });
  return total;
}

// The slope that a raw derivative stands for, and its derivative.
template <class M>
PYPERF_HD Value<M> spline_slope(const coupling::Spline<typename M::R>& c, Value<M> raw, Value<M>& bend) {
  Value<M> slope;
  if (c.exponential) {
    slope = exp<M>(soft_clipped<M>(raw, c.inverse_curve, bend));
    bend = bend * slope;
  } else {
    slope = softplus<M>(raw * c.curve, bend) * c.inverse_curve + c.least_slope;
  }
  const auto large = M::less(M::of(c.largest_slope), slope);
  bend = M::select(large, M::of(0), bend);
  return M::select(large, M::of(c.largest_slope), slope);
}

// Where a bin starts. In float the small terms are added last, where the sum is no larger than the result. In double
// they are added to the corner: that much less exact, but symmetric splines have their middle knot at 0.
template <class M>
PYPERF_HD Value<M> spline_edge(const SplineSide<M>& side, Value<M> k, typename M::R least, Value<M> rest,
                               typename M::R corner) {
  if constexpr (sizeof(corner) == 4)
    return M::fma(side.before, side.per_unit, M::of(corner)) + M::fma(side.before, rest, k * least);
  else
    return M::fma(side.before, side.per_unit, M::fma(side.before, rest, M::fma(k, M::of(least), M::of(corner))));
}

// Finds the bin of x (of y, where the spline is inverted) and where in it the point lies, in the box that is not
// scaled. ew and eh are left holding the exponentials. bound: read where boxes are scaled.
template <class M, int kBins, bool kScaled, class Widths, class Heights, class Derivatives>
PYPERF_HD void spline_locate(const coupling::Spline<typename M::R>& c, Value<M> at, Value<M> bound, const Widths& raw_w,
                             const Heights& raw_h, const Derivatives& raw_d, Value<M>* ew, Value<M>* eh,
                             SplinePoint<M>& p) {
  using R = typename M::R;
  using coupling::Tails;
  const bool scaled = kScaled && c.scaled, mixed = kScaled && c.tails == Tails::mixed;
  const int bins = kBins ? kBins : c.bins;
  const auto zero = M::of(R(0)), one = M::of(R(1));
  p.bound = bound;
  if (scaled) {
    constexpr R kSmallest = R(0x1p-100), kLargest = R(0x1p100);
    const auto size = mixed ? abs<M>(bound) : bound;
    p.bound = M::select(M::at_least(size, M::of(kSmallest)) & M::at_least(M::of(kLargest), size), bound, M::of(R(NAN)));
  }
  const auto place = scaled ? at / abs<M>(p.bound) : at;
  const auto w_total = spline_exponentials<M, kBins>(c, raw_w, ew),
             h_total = spline_exponentials<M, kBins>(c, raw_h, eh);
  p.width.inverse_sum = one / w_total, p.height.inverse_sum = one / h_total;
  p.width.per_unit = p.width.inverse_sum * c.width_room;
  p.height.per_unit = p.height.inverse_sum * c.height_room;
  // What rounding took from these: it would shift all knots alike.
  const auto w_rest = M::fma(-p.width.per_unit, w_total, M::of(c.width_room)) * p.width.inverse_sum;
  const auto h_rest = M::fma(-p.height.per_unit, h_total, M::of(c.height_room)) * p.height.inverse_sum;

  const R low = c.inverse ? c.bottom : c.left, high = c.inverse ? c.top : c.right;
  const R least = c.inverse ? c.least_height : c.least_width;
  const auto per_unit = c.inverse ? p.height.per_unit : p.width.per_unit;
  p.inside = M::at_least(place, M::of(low)) & M::at_least(M::of(high), place);
  p.high = M::less(M::of(high), place);
  const auto t = M::select(p.inside, place, M::select(p.high, M::of(high), M::of(low)));

  // The bin, while the sums run.
  const int first_knot = c.tails == Tails::linear ? -1 : 0;  // raw derivative of a bin's left end, less its number
  const int count = bins + c.extra_derivatives();
  const bool closed = c.tails == Tails::circular || mixed;  // the last knot has the slope of the first
  const auto knot = [&](int i) __attribute__((always_inline)) {
    i = i == count && closed ? 0 : i;
    return i >= 0 && i < count ? raw_d(i) : M::of(R(0));
  };
  RunningSum<M> w_sum{zero, zero, zero, zero, zero, zero}, h_sum = w_sum;
  auto raw0 = knot(first_knot), next = knot(first_knot + 1), raw1 = next;
  p.k = zero;
  auto number = zero;
  p.width.before = zero, p.width.own = ew[0], p.height.before = zero, p.height.own = eh[0];
  each<1, kBins>(bins, [&](int j) __attribute__((always_inline)) {
    const auto w_before = w_sum.add(ew[j - 1], j), h_before = h_sum.add(eh[j - 1], j);
    number = number + one;
    const auto edge = M::fma(c.inverse ? h_before : w_before, per_unit, M::fma(number, M::of(least), M::of(low)));
    const auto reached = M::at_least(t, edge);
    p.width.before = M::select(reached, w_before, p.width.before);
    p.height.before = M::select(reached, h_before, p.height.before);
    p.width.own = M::select(reached, ew[j], p.width.own);
    p.height.own = M::select(reached, eh[j], p.height.own);
    p.k = M::select(reached, number, p.k);
    if constexpr (M::kLanes > 1) {
      const auto left = next;
      next = knot(first_knot + j + 1);
      raw0 = M::select(reached, left, raw0);
      raw1 = M::select(reached, next, raw1);
    }
  });
  if constexpr (M::kLanes == 1) {
    const int k = int(p.k);
    raw0 = knot(first_knot + k);
    raw1 = knot(first_knot + k + 1);
  }
  p.last = M::at_least(p.k, M::of(R(bins - 1)));
  p.x_edge = spline_edge<M>(p.width, p.k, c.least_width, w_rest, c.left);
  p.y_edge = spline_edge<M>(p.height, p.k, c.least_height, h_rest, c.bottom);
  p.w = M::fma(p.width.own, p.width.per_unit, M::of(c.least_width));
  p.h = M::fma(p.height.own, p.height.per_unit, M::of(c.least_height));

  p.d0 = spline_slope<M>(c, raw0, p.bend0);
  p.d1 = spline_slope<M>(c, raw1, p.bend1);
  if (c.tails == Tails::linear || mixed) {
    p.free0 = M::at_least(p.k, one), p.free1 = M::less(p.k, M::of(R(bins - 1)));
    if (mixed) {
      const auto circular = M::less(p.bound, zero);
      p.free0 = p.free0 | circular, p.free1 = p.free1 | circular;
    }
    p.d0 = M::select(p.free0, p.d0, one), p.bend0 = M::select(p.free0, p.bend0, zero);
    p.d1 = M::select(p.free1, p.d1, one), p.bend1 = M::select(p.free1, p.bend1, zero);
  }

  p.s = p.h / p.w;
  // How far t is into the bin; in the last one, how far from its end.
  const auto size = c.inverse ? p.h : p.w;
  const auto part =
      clamp<M>(M::select(p.last, M::of(high) - t, t - (c.inverse ? p.y_edge : p.x_edge)) / size, zero, one);
  p.theta = M::select(p.last, one - part, part);
  p.phi = M::select(p.last, part, one - part);
  if (c.inverse) {
    // Of the two roots of a quadratic the one in [0, 1], from the end that makes all terms >= 0.
    const auto b = (p.d0 - p.s) * p.phi - (p.d1 - p.s) * p.theta, r = abs<M>(b);
    const auto swap = M::less(b, zero);
    const auto za = M::select(swap, p.phi, p.theta), zb = M::select(swap, p.theta, p.phi), q = p.s - r;
    const auto root = M::sqrt(M::fma(q, q, p.s * zb * r * R(4)));
    auto v = p.s * za * R(2) / (p.s + r + root);
    v = M::select(M::less(one, v) | M::at_least(zero, zb), one, v);  // a bin's ends exactly; NaN stays
    p.theta = M::select(swap, one - v, v);
    p.phi = M::select(swap, v, one - v);
  }
  const auto q = p.theta * p.phi, theta2 = p.theta * p.theta, phi2 = p.phi * p.phi;
  p.below = M::fma(p.s, theta2 + phi2, (p.d0 + p.d1) * q);
  p.above = M::fma(p.d1, theta2, M::fma(p.d0, phi2, p.s * q * R(2)));
  p.top = M::fma(p.s, theta2, p.d0 * q);
  p.excess = scaled ? M::fma(-t, abs<M>(p.bound), at) : at - t;
  if (c.inverse) p.excess = p.excess / edge_slope<M>(p);
}

template <class M, bool kScaled>
PYPERF_HD void spline_value(const coupling::Spline<typename M::R>& c, const SplinePoint<M>& p, Value<M> at, Value<M>& y,
                            Value<M>& logdet) {
  using R = typename M::R;
  const auto by = p.s / p.below;
  logdet = log<M>(by * p.above * by);
  if (c.inverse) {
    logdet = -logdet;
    const auto from_end = M::fma(-p.phi, p.w, M::of(c.right)), from_edge = M::fma(p.theta, p.w, p.x_edge);
    y = clamp<M>(M::select(p.last, from_end, from_edge), M::of(c.left), M::of(c.right));
  } else {
    const auto rest = M::fma(p.s, p.phi * p.phi, p.d1 * (p.theta * p.phi));
    const auto f = M::select(p.last, -rest, p.top) / p.below;
    y = clamp<M>(M::fma(f, p.h, M::select(p.last, M::of(c.top), p.y_edge)), M::of(c.bottom), M::of(c.top));
  }
  if (kScaled && c.scaled) y = y * abs<M>(p.bound);
  if (c.tails == coupling::Tails::bounded) {
    y = M::select(p.inside, y, c.inverse ? y + p.excess : M::fma(p.excess, edge_slope<M>(p), y));
    y = M::select(M::at_least(at, at), y, at);
  } else {
    y = M::select(p.inside, y, at);
    logdet = M::select(p.inside, logdet, M::of(R(0)));
  }
  if (kScaled && c.scaled) {
    const auto there = M::at_least(p.bound, p.bound);
    y = M::select(there, y, p.bound);
    logdet = M::select(there, logdet, p.bound);
  }
}

// Gradient of the input, and put_w(j, g), put_h(j, g), put_d(j, g) of each raw parameter, each put after its last read.
template <class M, int kBins, bool kScaled, class Widths, class Heights, class PutWidths, class PutHeights,
          class PutDerivatives>
PYPERF_HD Value<M> spline_gradients(const coupling::Spline<typename M::R>& c, const SplinePoint<M>& p, Value<M> grad_y,
                                    Value<M> grad_logdet, const Widths& raw_w, const Heights& raw_h, const Value<M>* ew,
                                    const Value<M>* eh, const PutWidths& put_w, const PutHeights& put_h,
                                    const PutDerivatives& put_d) {
  using R = typename M::R;
  using coupling::Tails;
  const bool scaled = kScaled && c.scaled, mixed = kScaled && c.tails == Tails::mixed;
  const int bins = kBins ? kBins : c.bins;
  const auto zero = M::of(R(0)), one = M::of(R(1));
  const bool bounded = c.tails == Tails::bounded;
  const auto q = p.theta * p.phi, theta2 = p.theta * p.theta, phi2 = p.phi * p.phi;
  const auto by = p.s / p.below, per_s = one / p.s, per_below = by * per_s, per_above = one / p.above,
             per_w = one / p.w;
  const auto slope = M::select(p.inside, by * p.above * by, edge_slope<M>(p));
  // d log slope / d theta
  const auto lean = ((M::fma(p.d1, p.theta, -p.d0 * p.phi) + p.s * (p.phi - p.theta)) * per_above -
                     (p.d0 + p.d1 - p.s * R(2)) * (p.phi - p.theta) * per_below) *
                    R(2);
  // By the raw parameters of an element outside, which has no gradient; of one without a box it is NaN.
  const auto none = scaled ? p.bound - p.bound : zero;
  const auto grad_out = scaled ? grad_y * abs<M>(p.bound) : grad_y;  // in the box that is not scaled, as what follows
  auto gy = grad_out, gl = grad_logdet, grad_in = grad_out;
  if (c.inverse) {  // x(y): the chain rule through y(x) - y = 0
    gl = -gl;
    const auto by_x = M::fma(gl, M::select(p.inside, lean * per_w, zero), grad_out);
    grad_in = by_x / slope;
    gy = -grad_in;
    if (!bounded) grad_in = M::select(p.inside, grad_in, grad_out);
  } else {
    grad_in = M::fma(gy, slope, gl * lean * per_w);
    grad_in = M::select(p.inside, grad_in, bounded ? gy * slope : gy);
  }
  const auto share = q * per_below, gh = gy * (p.s * p.w) * share * per_below;
  const auto by_s =
      M::fma(gh, p.d1 * theta2 - p.d0 * phi2, gl * R(2) * (per_s + q * per_above - (theta2 + phi2) * per_below));
  auto by_d0 = M::fma(gh, M::fma(p.s, phi2, p.d1 * q), gl * (phi2 * per_above - share * R(2)));
  auto by_d1 = M::fma(-gh, p.top, gl * (theta2 * per_above - share * R(2)));
  by_d0 = by_d0 * p.bend0, by_d1 = by_d1 * p.bend1;
  // By an input outside the box.
  const auto grad_outside = !bounded ? grad_y : c.inverse ? grad_y / edge_slope<M>(p) : grad_y * edge_slope<M>(p);
  if (bounded) {  // held within the numbers, so that a slope which does not bend gets 0 however far x is
    const auto most = M::of(FloatFormat<R>::kLargest);
    const auto excess = clamp<M>(p.excess, -most, most) * M::select(p.high, p.bend1, p.bend0);
    const auto beyond = M::select(p.inside, zero, excess * (c.inverse ? -grad_outside : grad_y));
    by_d0 = by_d0 + M::select(p.high, zero, beyond);
    by_d1 = by_d1 + M::select(p.high, beyond, zero);
  } else {
    by_d0 = M::select(p.inside, by_d0, none), by_d1 = M::select(p.inside, by_d1, none);
  }
  if (mixed) by_d0 = M::select(p.free0, by_d0, none), by_d1 = M::select(p.free1, by_d1, none);

  // By a bin's size and by the corner where it starts, then through the softmax: its share times one of three numbers.
  // A bin that moves takes the curve along.
  const auto by_size = by_s * per_w;
  const auto w_edge = c.inverse ? grad_out : -grad_in, w_own = M::fma(w_edge, p.theta, -by_size * p.s);
  const auto h_edge = gy, h_own = M::fma(gy, p.top * per_below, by_size);
  const auto w_mean = p.width.inverse_sum * M::fma(w_edge, p.width.before, w_own * p.width.own);
  const auto h_mean = p.height.inverse_sum * M::fma(h_edge, p.height.before, h_own * p.height.own);
  const auto w_unit = M::select(p.inside, p.width.inverse_sum * (c.width_room * c.logit_scale), none);
  const auto h_unit = M::select(p.inside, p.height.inverse_sum * (c.height_room * c.logit_scale), none);
  const auto w0 = (w_edge - w_mean) * w_unit, w1 = (w_own - w_mean) * w_unit, w2 = -w_mean * w_unit;
  const auto h0 = (h_edge - h_mean) * h_unit, h1 = (h_own - h_mean) * h_unit, h2 = -h_mean * h_unit;
  auto number = zero;
  each<0, kBins>(bins, [&](int j) __attribute__((always_inline)) {
    const auto before = M::less(number, p.k), from = M::at_least(p.k, number);  // from & !before: its own
    const auto gw = ew[j] * M::select(before, w0, M::select(from, w1, w2));
    const auto ge = eh[j] * M::select(before, h0, M::select(from, h1, h2));
    if (c.exponential) {
      Value<M> w_clip, h_clip;
      soft_clipped<M>(raw_w(j), c.inverse_curve * R(2), w_clip);
      soft_clipped<M>(raw_h(j), c.inverse_curve * R(2), h_clip);
      put_w(j, gw * w_clip);
      put_h(j, ge * h_clip);
    } else {
      put_w(j, gw);
      put_h(j, ge);
    }
    number = number + one;
  });
  const int count = bins + c.extra_derivatives();
  const auto left = c.tails == Tails::linear ? p.k - R(1) : p.k;
  auto right = left + R(1);
  const bool right_is_first = c.tails == Tails::circular || mixed;  // of the last bin
  if (right_is_first) right = M::select(M::at_least(right, M::of(R(bins))), zero, right);
  const int most = kBins ? kBins + 1 : count;
  if constexpr (M::kLanes == 1) {
#pragma unroll
    for (int j = 0; j < most; ++j)
      if (j < count) put_d(j, none);
    const int l = int(left), r = int(right);
    if (l >= 0 && l < count) put_d(l, by_d0 + (l == r ? by_d1 : zero));
    if (l != r && r < count) put_d(r, by_d1 + zero);
  } else {
    by_d0 = by_d0 + (bins == 1 && right_is_first ? by_d1 : zero), by_d1 = by_d1 + zero;  // as above: never -0
    number = zero;
    each<0, kBins ? kBins + 1 : 0>(count, [&](int j) __attribute__((always_inline)) {
      if (kBins && j >= count) return;
      const auto own = M::select(M::equal(right, number), by_d1, none);
      put_d(j, M::select(M::equal(left, number), by_d0, own));
      number = number + one;
    });
  }
  if (scaled) {
    grad_in = M::select(p.inside, grad_in / abs<M>(p.bound), grad_outside);
    grad_in = M::select(M::at_least(p.bound, p.bound), grad_in, p.bound);
  }
  return grad_in;
}

}  // namespace math
