// Affine couplings, for a machine M of elementary.h. No include guard and no namespace, as there; prelude:
// elementary.h, coupling_affine_call.h.
//
// A scale e = exp(scale_sign * log_scale(u)) is kept as factor * 2^exponent, so that no product with it overflows or
// underflows on the way to a result that is representable.

template <class R>
struct AffineFormat;
template <>
struct AffineFormat<float> {
  static constexpr float kLargestLog = 200;            // exp of it takes the smallest number beyond the largest
  static constexpr float kVanishing = -160;            // 2 to that power is 0
  static constexpr float kFlatSoftplus = -17;          // below, log(softplus(u)) = u
  static constexpr float kLargeShift = 1.2676506e30f;  // 2^100
};
template <>
struct AffineFormat<double> {
  static constexpr double kLargestLog = 1500;
  static constexpr double kVanishing = -1100;
  static constexpr double kFlatSoftplus = -37;
  static constexpr double kLargeShift = 9.745314011399999e288;  // 2^960
};

namespace math {

// 2^n for a whole n within the exponents.
template <class M>
PYPERF_HD Value<M> power_of_two(Value<M> n) {
  using F = FloatFormat<typename M::R>;
  const auto whole = M::bits(n + F::kRound) - M::bits(M::of(F::kRound));
  return M::from_bits((whole + typename F::Int(F::kBias)) << F::kMantissa);
}

// factor * 2^n for a whole n; 0 or infinity where n is beyond the exponents.
template <class M>
PYPERF_HD Value<M> scaled_within(Value<M> factor, Value<M> n) {
  using F = FloatFormat<typename M::R>;
  constexpr typename M::R kBias = F::kBias;
  return factor * power_of_two<M>(clamp<M>(n, M::of(-kBias), M::of(kBias + 1)));
}

// a * factor * 2^exponent = product * 2^rest, where `product` overflows only if both do, and 2^rest is representable.
template <class M>
PYPERF_HD Value<M> unscaled_product(Value<M> a, Value<M> factor, Value<M> exponent, Value<M>& rest) {
  using R = typename M::R;
  using F = FloatFormat<R>;
  const auto third = M::fma(exponent - R(1), M::of(R(1.0 / 3)), M::of(F::kRound)) - F::kRound;  // floor(exponent / 3)
  rest = power_of_two<M>(M::fma(third, M::of(R(-2)), exponent));
  const auto part = power_of_two<M>(third);
  return a * part * factor * part;
}

// x >= 0
template <class M>
PYPERF_HD Value<M> atan_of_positive(Value<M> x) {
  using R = typename M::R;
  constexpr double kTanEighth = 0.41421356237309503, kTanThreeEighths = 2.4142135623730951;
  const auto middle = M::less(M::of(R(kTanEighth)), x), large = M::less(M::of(R(kTanThreeEighths)), x);
  const auto one = M::of(R(1));
  const auto below = M::select(large, x, M::select(middle, x + R(1), one));
  const auto above = M::select(large, M::of(R(-1)), M::select(middle, x - R(1), x));
  const auto base =
      M::select(large, M::of(R(1.5707963267948966)), M::select(middle, M::of(R(0.78539816339744831)), M::of(R(0))));
  const auto z = above / below, v = z * z;
  Value<M> series;
  if constexpr (sizeof(R) == 4)
    series = polynomial<M>(v, -0.333333317604345559, 0.199995403149579694, -0.14263949753605724, 0.107436683248300981,
                           -0.0645171886935895805);
  else
    series =
        polynomial<M>(v, -0.333333333333333332, 0.199999999999998043, -0.142857142856597778, 0.111111111051505879,
                      -0.0909090875325911294, 0.0769229636804212972, -0.0666642476020052014, 0.0587892755447380676,
                      -0.0523044364068694771, 0.0455154473402216165, -0.0345693150633260897, 0.0162843750500433943);
  return base + M::fma(z * v, series, z);
}

// Numbers of coupling::Affine in the precision of the arithmetic.
template <class R>
struct AffineConstants {
  R scale_sign, shift_sign, clamp, min_scale, max_scale;

  PYPERF_HD explicit AffineConstants(const coupling::Affine& how)
      : scale_sign(R(how.scale_sign)),
        shift_sign(R(how.shift_sign)),
        clamp(R(how.clamp)),
        min_scale(R(how.min_scale)),
        max_scale(R(how.max_scale)) {}
};

// logdet = sign * log_scale(u); exp of it is factor * 2^exponent; slope is its derivative.
template <class M, coupling::Activation kActivation>
PYPERF_HD void scale_of(AffineConstants<typename M::R> c, Value<M> u, Value<M>& logdet, Value<M>& factor,
                        Value<M>& exponent, Value<M>& slope) {
  using R = typename M::R;
  using F = AffineFormat<R>;
  using coupling::Activation;
  constexpr bool kFloor = kActivation == Activation::sigmoid_floor || kActivation == Activation::softplus_floor;
  constexpr bool kSigmoid = kActivation == Activation::sigmoid || kActivation == Activation::sigmoid_floor;
  const auto zero = M::of(R(0)), one = M::of(R(1)), sign = M::of(c.scale_sign);
  if constexpr (kActivation == Activation::none) {
    logdet = zero, factor = one, exponent = zero, slope = zero;
  } else if constexpr (kSigmoid || kActivation == Activation::softplus || kFloor) {
    // The scale itself, for its logarithm has lost digits of it where it is large.
    const auto v = kSigmoid ? u + R(2) : u;
    const auto negative = M::less(v, zero);
    Value<M> n;
    const auto power = exp_parts<M>(clamp<M>(-abs<M>(v), M::of(-F::kLargestLog), zero), n) + R(1);
    const auto e = M::scaled(power, M::larger(n, M::of(F::kVanishing))),
               reciprocal = R(1) / (e + R(1));  // e = exp(-|v|)
    const auto log1p = log1p_of_fraction<M>(e);
    const bool upwards = c.scale_sign > 0;
    if constexpr (kActivation == Activation::sigmoid) {
      logdet = sign * (M::smaller(v, zero) - log1p);
      slope = sign * M::select(negative, reciprocal, e * reciprocal);
      factor = M::select(negative, power, one);  // of the scale e / (1 + e) or 1 / (1 + e)
      factor = upwards ? factor * reciprocal : (e + R(1)) / factor;
      exponent = sign * M::select(negative, n, zero);
    } else if constexpr (kFloor) {
      // The scale is base + part; near 1, its logarithm needs what that sum rounds off.
      const auto least = M::of(c.min_scale), most = M::of(c.max_scale), share = e * reciprocal;
      const auto base = kSigmoid ? M::select(negative, zero, one) : M::larger(v, zero);
      const auto part = (kSigmoid ? M::select(negative, share, -share) : log1p) + least;
      const auto scale_by_u = kSigmoid ? share * reciprocal : M::select(negative, share, reciprocal);
      const auto sum = base + part;
      const auto within = M::at_least(most, sum);
      const auto scale = M::smaller(most, sum), inverse = R(1) / scale;
      const auto rest = M::select(within, part - (sum - base), zero);
      const auto log = M::fma(rest, inverse, log_of_normal<M>(scale, zero));
      logdet = sign * M::select(M::less(scale, M::of(R(HUGE_VAL))), log, scale);
      slope = sign * M::select(within, scale_by_u * inverse, zero);
      factor = upwards ? scale : inverse;
      exponent = zero;
    } else {
      const auto tiny = M::less(v, M::of(F::kFlatSoftplus));  // softplus(v) = e there
      const auto scale = M::larger(v, zero) + log1p;
      const auto normal = M::at_least(v, M::of(F::kFlatSoftplus)) & M::less(v, M::of(R(HUGE_VAL)));
      logdet = sign * M::select(normal, log_of_normal<M>(scale, zero), v);
      slope = sign * M::select(tiny, one, M::select(negative, e * reciprocal, reciprocal) / scale);
      factor = M::select(tiny, power, scale);
      if (!upwards) factor = R(1) / factor;
      exponent = sign * M::select(tiny, n, zero);
    }
  } else {
    const auto limit = M::of(c.clamp), size = abs<M>(u);
    if constexpr (kActivation == Activation::exp) {
      logdet = sign * clamp<M>(u, -limit, limit);
      slope = M::select(M::at_least(limit, size), sign, zero);
    } else if constexpr (kActivation == Activation::tanh) {
      Value<M> n;
      const auto f = exp_parts<M>(clamp<M>(size * R(-2), M::of(R(-80)), zero), n), power = power_of_two<M>(n);
      const auto less_one = M::fma(power, f, power - R(1));  // exp(-2 |u|) - 1
      const auto below = less_one + R(2), e = M::fma(power, f, power);
      const auto large = M::less(M::of(R(0.55)), size);  // near 1, what is missing there has less of an error
      const auto ratio = M::select(large, e + e, abs<M>(less_one)) / below;
      logdet = sign * limit * with_sign<M>(M::select(large, one - ratio, ratio), u);
      slope = sign * limit * (R(4) * e / (below * below));
    } else if constexpr (kActivation == Activation::atan) {
      const auto amplitude = sign * limit * R(0.636);
      logdet = amplitude * with_sign<M>(atan_of_positive<M>(size), u);
      slope = amplitude / M::fma(u, u, one);
    } else {  // u / (1 + |u / limit|), whichever of the two is small
      const auto small = M::less(size, limit);
      const auto ratio = M::select(small, size, limit) / M::select(small, limit, size);
      const auto below = ratio + R(1);
      logdet = sign * with_sign<M>(M::select(small, size, limit) / below, u);
      slope = sign * (M::select(small, one, ratio * ratio) / (below * below));
    }
    const auto bounded = clamp<M>(logdet, M::of(-F::kLargestLog), M::of(F::kLargestLog));
    factor = exp_parts<M>(bounded, exponent) + R(1);
  }
}

// Whether a scale, or its part of a result, is a number with all its digits: then plain products are right.
template <class M>
PYPERF_HD typename M::Mask is_ordinary(Value<M> scale) {
  using F = FloatFormat<typename M::R>;
  return M::at_least(scale, M::of(F::kSmallestNormal)) & M::at_least(M::of(F::kLargest), scale);
}

// Where scales are not ordinary. A large shift is taken by a quarter, so that it may cancel what is beyond the largest
// number.
template <class M, bool kBefore>
PYPERF_HD Value<M> affine_value_of_any(Value<M> x, Value<M> t, Value<M> factor, Value<M> exponent) {
  using R = typename M::R;
  const auto size = kBefore ? M::larger(abs<M>(t), abs<M>(x)) : abs<M>(t);
  const auto large = M::less(M::of(AffineFormat<R>::kLargeShift), size);
  const auto down = M::select(large, M::of(R(0.25)), M::of(R(1)));
  const auto two = M::select(large, M::of(R(2)), M::of(R(0)));
  Value<M> rest;
  if constexpr (kBefore) {
    const auto product = unscaled_product<M>(M::fma(x, down, t * down), factor, exponent + two, rest);
    return product * rest;
  } else {
    const auto up = M::select(large, M::of(R(4)), M::of(R(1)));
    const auto product = unscaled_product<M>(x, factor, exponent - two, rest);
    return M::fma(product, rest, t * down) * up;
  }
}

// The coupling itself.
template <class M, bool kBefore>
PYPERF_HD Value<M> affine_value(AffineConstants<typename M::R> c, Value<M> x, Value<M> shift, Value<M> factor,
                                Value<M> exponent) {
  const auto t = shift * c.shift_sign, e = scaled_within<M>(factor, exponent);
  auto ordinary = is_ordinary<M>(e);
  Value<M> y;
  if constexpr (kBefore) {
    const auto sum = x + t;
    ordinary = ordinary & M::at_least(M::of(FloatFormat<typename M::R>::kLargest), abs<M>(sum));
    y = sum * e;
  } else {
    y = M::fma(x, e, t);
  }
  if (M::all(ordinary)) return y;
  return M::select(ordinary, y, affine_value_of_any<M, kBefore>(x, t, factor, exponent));
}

// d y / d x * grad_y, and d / d log e, where scales are not ordinary.
template <class M, bool kBefore>
PYPERF_HD Value<M> affine_gradients_of_any(Value<M> grad_y, Value<M> grad_logdet, Value<M> x, Value<M> t,
                                           Value<M> factor, Value<M> exponent, Value<M> slope, Value<M>& of_log) {
  using R = typename M::R;
  const auto largest = M::of(FloatFormat<R>::kLargest), zero = M::of(R(0));
  Value<M> rest;
  const auto grad_x = unscaled_product<M>(grad_y, factor, exponent, rest) * rest;
  Value<M> down = M::of(R(1)), up = down, a = x;  // a * up is what is scaled
  if constexpr (kBefore) {
    const auto large = M::less(M::of(AffineFormat<R>::kLargeShift), M::larger(abs<M>(t), abs<M>(x)));
    down = M::select(large, M::of(R(0.25)), down), up = M::select(large, M::of(R(4)), up);
    a = M::fma(x, down, t * down);
  }
  const auto by_scale = unscaled_product<M>(a, factor, exponent, rest) * rest * up;  // d y / d log e
  const auto fits = M::at_least(largest, abs<M>(by_scale));
  of_log = M::select(fits, grad_y * by_scale, grad_x * a * up) + grad_logdet;
  // Infinity is no reason for NaN where the activation is flat.
  of_log = M::select(M::less(zero, abs<M>(slope)), of_log, clamp<M>(of_log, -largest, largest));
  return grad_x;
}

// Gradients of x, of u (grad_scale) and of the shift.
template <class M, bool kBefore>
PYPERF_HD void affine_gradients(AffineConstants<typename M::R> c, Value<M> grad_y, Value<M> grad_logdet, Value<M> x,
                                Value<M> shift, Value<M> factor, Value<M> exponent, Value<M> slope, Value<M>& grad_x,
                                Value<M>& grad_scale, Value<M>& grad_shift) {
  const auto t = shift * c.shift_sign, e = scaled_within<M>(factor, exponent);
  grad_x = grad_y * e;
  auto of_log = M::fma(grad_y, (kBefore ? x + t : x) * e, grad_logdet);
  const auto ordinary = is_ordinary<M>(e) & M::at_least(M::of(FloatFormat<typename M::R>::kLargest), abs<M>(of_log));
  if (!M::all(ordinary)) {
    Value<M> other;
    const auto any = affine_gradients_of_any<M, kBefore>(grad_y, grad_logdet, x, t, factor, exponent, slope, other);
    grad_x = M::select(ordinary, grad_x, any);
    of_log = M::select(ordinary, of_log, other);
  }
  grad_scale = slope * of_log;
  grad_shift = (kBefore ? grad_x : grad_y) * c.shift_sign;
}

}  // namespace math
