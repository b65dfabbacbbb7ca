// Elementary functions as polynomials, in float and double, for scalars (CUDA, tails) and for the vectors of a CPU from
// one source, with the same bits on all of them.
//
// A machine M says what a value is and does what an operator cannot say:
//   M::V             the value: a scalar, or a vector of the compiler's; + - * / work on it
//   M::R, M::Int     its scalar, and the integers of that width
//   M::Mask          the result of M::less, M::at_least and M::equal; & and | work on it, M::all(mask) is a bool
//   M::of, fma, sqrt, select(mask, a, b), bits, from_bits, scaled(v, n) = v * 2^n for a whole n,
//   larger(a, b), smaller(a, b): b where either is NaN
// Errors in ulps are tested (tests/native/elementary_cpu.cpp).
//
// No include guard and no namespace: a function takes the instruction set of the place where it stands, so
// ../cpu/machine.h includes this once for each SIMD level, and ../cuda/elementary.cuh once for CUDA. Prelude: <cmath>,
// <cstdint>, <cstring>, <type_traits>, ../common/platform.h.

template <class R>
struct FloatFormat;
template <>
struct FloatFormat<float> {
  using Int = int32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kRound = 12582912.0f;      // 1.5 * 2^23: adding it rounds to whole numbers
  static constexpr float kLog2High = 0.693359375f;  // n * this is exact for the exponents n
  static constexpr float kLog2Low = -2.12194440e-4f;
  static constexpr float kExpLowest = -104.0f, kExpHighest = 89.0f;
  static constexpr float kSmallestNormal = 1.17549435e-38f, kLargest = 3.40282347e38f;
  static constexpr float kSubnormalScale = 16777216.0f;  // 2^24
  static constexpr int kSubnormalExponent = 24;
};
template <>
struct FloatFormat<double> {
  using Int = int64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 6755399441055744.0;
  static constexpr double kLog2High = 6.93147180369123816490e-01;
  static constexpr double kLog2Low = 1.90821492927058770002e-10;
  static constexpr double kExpLowest = -746.0, kExpHighest = 710.0;
  static constexpr double kSmallestNormal = 2.2250738585072014e-308, kLargest = 1.7976931348623157e308;
  static constexpr double kSubnormalScale = 18014398509481984.0;  // 2^54
  static constexpr int kSubnormalExponent = 54;
};

// The bits of a scalar as a number that wraps around, as those of vectors do.
template <class I>
struct WrappingInt {
  using Unsigned = std::make_unsigned_t<I>;
  I value;

  PYPERF_HD WrappingInt(I value) : value(value) {}
  PYPERF_HD friend WrappingInt operator+(WrappingInt a, WrappingInt b) {
    return I(Unsigned(a.value) + Unsigned(b.value));
  }
  PYPERF_HD friend WrappingInt operator-(WrappingInt a, WrappingInt b) {
    return I(Unsigned(a.value) - Unsigned(b.value));
  }
  PYPERF_HD friend WrappingInt operator&(WrappingInt a, WrappingInt b) { return I(a.value & b.value); }
  PYPERF_HD friend WrappingInt operator|(WrappingInt a, WrappingInt b) { return I(a.value | b.value); }
  PYPERF_HD friend WrappingInt operator<<(WrappingInt a, int n) { return I(Unsigned(a.value) << n); }
  PYPERF_HD friend WrappingInt operator>>(WrappingInt a, int n) { return I(a.value >> n); }
};

// One number: a thread of a GPU.
template <class Real>
struct ScalarMachine {
  using R = Real;
  using V = R;
  using Int = WrappingInt<typename FloatFormat<R>::Int>;
  using Mask = bool;
  static constexpr int kLanes = 1;

  PYPERF_HD static V of(R r) { return r; }
  PYPERF_HD static V select(Mask m, V a, V b) { return m ? a : b; }
  PYPERF_HD static bool all(Mask m) { return m; }
  PYPERF_HD static Mask less(V a, V b) { return a < b; }
  PYPERF_HD static Mask at_least(V a, V b) { return a >= b; }
  PYPERF_HD static Mask equal(V a, V b) { return a == b; }
  PYPERF_HD static V larger(V a, V b) { return a > b ? a : b; }
  PYPERF_HD static V smaller(V a, V b) { return a < b ? a : b; }
  PYPERF_HD static V fma(V a, V b, V c) {
    if constexpr (sizeof(R) == 4)
      return ::fmaf(a, b, c);
    else
      return ::fma(a, b, c);
  }
  PYPERF_HD static V sqrt(V a) {
    if constexpr (sizeof(R) == 4)
      return ::sqrtf(a);
    else
      return ::sqrt(a);
  }
  PYPERF_HD static Int bits(V a) {
    typename FloatFormat<R>::Int i;
    memcpy(&i, &a, sizeof i);
    return i;
  }
  PYPERF_HD static V from_bits(Int i) {
    V a;
    memcpy(&a, &i.value, sizeof a);
    return a;
  }
  PYPERF_HD static V scaled(V v, V n);
};

namespace math {

template <class M>
using Value = typename M::V;

// Within [low, high]; NaN stays.
template <class M>
PYPERF_HD Value<M> clamp(Value<M> v, Value<M> low, Value<M> high) {
  return M::smaller(high, M::larger(low, v));
}
template <class M>
PYPERF_HD Value<M> abs(Value<M> v) {
  using Int = typename FloatFormat<typename M::R>::Int;
  return M::from_bits(M::bits(v) & ~(Int(1) << (8 * int(sizeof(Int)) - 1)));
}
// v with the sign of s. v >= 0
template <class M>
PYPERF_HD Value<M> with_sign(Value<M> v, Value<M> s) {
  using Int = typename FloatFormat<typename M::R>::Int;
  return M::from_bits(M::bits(v) | (M::bits(s) & (Int(1) << (8 * int(sizeof(Int)) - 1))));
}

// c0 + c1 x + c2 x^2 + ...
template <class M>
PYPERF_HD Value<M> polynomial(Value<M>, double c) {
  return M::of(typename M::R(c));
}
template <class M, class... Rest>
PYPERF_HD Value<M> polynomial(Value<M> x, double c, Rest... rest) {
  return M::fma(polynomial<M>(x, rest...), x, M::of(typename M::R(c)));
}

// v * 2^n for n that may leave the exponents, in two steps of which at most the second rounds.
template <class M>
PYPERF_HD Value<M> scaled_in_steps(Value<M> v, Value<M> n) {
  using F = FloatFormat<typename M::R>;
  const auto i = M::bits(n + F::kRound) - M::bits(M::of(F::kRound));
  const auto half = i >> 1, rest = i - half;
  v = v * M::from_bits((half + typename F::Int(F::kBias)) << F::kMantissa);
  return v * M::from_bits((rest + typename F::Int(F::kBias)) << F::kMantissa);
}

// exp(x) = (1 + f) * 2^n with -0.3 < f < 0.42; returns f. Beyond the range of exp itself too, up to |x| = 1500.
template <class M>
PYPERF_HD Value<M> exp_parts(Value<M> x, Value<M>& n) {
  using R = typename M::R;
  using F = FloatFormat<R>;
  n = M::fma(x, M::of(R(1.4426950408889634)), M::of(F::kRound)) - F::kRound;
  auto r = M::fma(n, M::of(-F::kLog2High), x);
  r = M::fma(n, M::of(-F::kLog2Low), r);
  Value<M> p;
  if constexpr (sizeof(R) == 4)
    p = polynomial<M>(r, 0.49999993372855056, 0.16666519521795198, 0.041668401129923364, 0.008368851279253724,
                      0.001381431837544762);
  else
    p = polynomial<M>(r, 0.5, 0.16666666666666666, 0.041666666666666664, 0.008333333333333333, 0.001388888888888889,
                      0.0001984126984126984, 2.48015873015873e-05, 2.7557319223985893e-06, 2.755731922398589e-07,
                      2.505210838544172e-08, 2.08767569878681e-09, 1.6059043836821613e-10);
  return M::fma(r * r, p, r);
}

template <class M>
PYPERF_HD Value<M> exp(Value<M> x) {
  using F = FloatFormat<typename M::R>;
  Value<M> n;
  const auto f = exp_parts<M>(clamp<M>(x, M::of(F::kExpLowest), M::of(F::kExpHighest)), n);
  return M::scaled(f + typename M::R(1), n);
}

// exp(x) for x <= 0 in a sum whose largest term is 1: constant where that would not be a normal number. Half the work
// of exp; x is rounded once more, with log2 e.
template <class M>
PYPERF_HD Value<M> exp_of_share(Value<M> x) {
  using R = typename M::R;
  using F = FloatFormat<R>;
  constexpr R kPowers = R(1.4426950408889634);
  constexpr R kRound = F::kRound + R(F::kBias);  // leaves a power's exponent bits in the lowest ones
  x = M::larger(M::of(R(1 - F::kBias) / kPowers), x);
  const auto rounding = M::fma(x, M::of(kPowers), M::of(kRound));
  const auto f = M::fma(x, M::of(kPowers), kRound - rounding);  // within half a power
  Value<M> p;
  if constexpr (sizeof(R) == 4)
    p = polynomial<M>(f, 1, 0.69314718802622878, 0.24022650760568127, 0.055503571142190778, 0.0096180825572778515,
                      0.0013390863364671234, 0.0001545316294512069);
  else
    p = polynomial<M>(f, 1, 0.69314718055994531, 0.24022650695910098, 0.055504108664821594, 0.0096181291076068885,
                      0.0013333558146416935, 0.0001540353044173605, 1.5252733829836118e-5, 1.321544258792169e-6,
                      1.0178062445845774e-7, 7.0725859492692237e-9, 4.4549605981865184e-10);
  return p * M::from_bits(M::bits(rounding) << F::kMantissa);
}

// log(v) for a normal v > 0.
template <class M>
PYPERF_HD Value<M> log_of_normal(Value<M> v, Value<M> added_to_exponent) {
  using R = typename M::R;
  using F = FloatFormat<R>;
  // v = 2^n * m with m in [sqrt(1/2), sqrt(2))
  const auto root = M::bits(M::of(R(0.70710678118654752)));
  const auto exponent = (M::bits(v) - root) >> F::kMantissa;
  const auto m = M::from_bits(M::bits(v) - (exponent << F::kMantissa));
  const auto n = M::from_bits(exponent + M::bits(M::of(F::kRound))) - F::kRound + added_to_exponent;
  const auto f = m - R(1);
  const auto half_square = f * f * R(0.5);
  Value<M> tail;  // log(1 + f) = f - f^2 / 2 + tail
  if constexpr (sizeof(R) == 4) {
    tail = f * f * f *
           polynomial<M>(f, 0.33333312602801496, -0.2500000960366467, 0.20002118732288335, -0.1666799566662192,
                         0.14219550906304348, -0.12405591423851223, 0.11888174618012086, -0.11675641272277415,
                         0.06746601248797919);
  } else {
    const auto s = f / (f + R(2)), z = s * s;
    const auto series =
        z * polynomial<M>(z, 0.33333333333333326, 0.1999999999999908, 0.1428571428595616, 0.11111111426611706,
                          0.09090841948657591, 0.07697352519529944, 0.06499195773245674, 0.08112584973239116);
    tail = s * (half_square + (series + series));  // 2 atanh(s) = 2 s + 2 s series; 2 s = f - s f
  }
  const auto low = M::fma(n, M::of(F::kLog2Low), tail - half_square);
  return M::fma(n, M::of(F::kLog2High), f + low);
}

template <class M>
PYPERF_HD Value<M> log(Value<M> x) {
  using R = typename M::R;
  using F = FloatFormat<R>;
  const R infinity = R(HUGE_VAL);
  const auto zero = M::of(R(0));
  const auto positive = M::less(zero, x) & M::less(x, M::of(infinity));
  const auto subnormal = M::less(x, M::of(F::kSmallestNormal));
  const auto v = M::select(positive, M::select(subnormal, x * F::kSubnormalScale, x), M::of(R(1)));
  const auto r = log_of_normal<M>(v, M::select(subnormal, M::of(R(-F::kSubnormalExponent)), zero));
  const auto special = M::select(M::less(x, zero), M::of(R(NAN)), x + x);  // NaN and inf stay
  const auto nothing = M::at_least(zero, x) & M::at_least(x, zero);
  return M::select(positive, r, M::select(nothing, M::of(-infinity), special));
}

// log(1 + e) for e in [0, 1].
template <class M>
PYPERF_HD Value<M> log1p_of_fraction(Value<M> e) {
  using R = typename M::R;
  const auto u = e / (e + R(2)), v = u * u;  // 2 atanh(u)
  Value<M> series;
  if constexpr (sizeof(R) == 4)
    series = polynomial<M>(v, 0.3333333781101911, 0.19999438869496597, 0.1430844244801741, 0.10713828433623444,
                           0.12150469058509364);
  else
    series = polynomial<M>(v, 0.3333333333333332, 0.20000000000070398, 0.14285714273425126, 0.11111112130656012,
                           0.09090862343608823, 0.07693580647039998, 0.06645331933335827, 0.06102812369845516,
                           0.039159325412491744, 0.09043339237874821);
  return R(2) * M::fma(u * v, series, u);
}

// log(1 + exp(x)), and its derivative.
template <class M>
PYPERF_HD Value<M> softplus(Value<M> x, Value<M>& sigmoid) {
  using R = typename M::R;
  const auto e = exp<M>(-abs<M>(x)), r = R(1) / (e + R(1));
  const auto negative = M::less(x, M::of(R(0)));
  sigmoid = M::select(negative, e * r, r);
  return M::larger(M::of(R(0)), x) + log1p_of_fraction<M>(e);
}

}  // namespace math

template <class Real>
PYPERF_HD Real ScalarMachine<Real>::scaled(Real v, Real n) {
  return math::scaled_in_steps<ScalarMachine>(v, n);
}
