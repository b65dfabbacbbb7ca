// The widest vector of floats or doubles as a machine for kernels/math; stamped once for each SIMD level
// (simd_levels.h). Prelude: that of ../math/elementary.h.
#include "../math/elementary.h"

template <class Real>
struct VectorMachine {
  using R = Real;
  using Int_ = typename FloatFormat<R>::Int;
  static constexpr int kLanes = PYPERF_VECTOR_BYTES / int(sizeof(R));
  typedef R V __attribute__((vector_size(PYPERF_VECTOR_BYTES)));
  typedef Int_ Int __attribute__((vector_size(PYPERF_VECTOR_BYTES)));

  PYPERF_HD static V of(R r) { return r - V{}; }  // V{} + r makes 0 of -0, so that it stays an addition
  PYPERF_HD static Int bits(V a) { return (Int)a; }
  PYPERF_HD static V from_bits(Int i) { return (V)i; }

#if PYPERF_VECTOR_BYTES == 64
  using Mask = std::conditional_t<sizeof(R) == 4, uint16_t, uint8_t>;
  PYPERF_HD static Mask less(V a, V b) {
    if constexpr (sizeof(R) == 4)
      return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ);
    else
      return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LT_OQ);
  }
  PYPERF_HD static Mask at_least(V a, V b) {
    if constexpr (sizeof(R) == 4)
      return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
    else
      return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GE_OQ);
  }
  PYPERF_HD static Mask equal(V a, V b) {
    if constexpr (sizeof(R) == 4)
      return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ);
    else
      return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_EQ_OQ);
  }
  PYPERF_HD static bool all(Mask m) { return m == Mask(-1); }
  PYPERF_HD static V select(Mask m, V a, V b) {
    if constexpr (sizeof(R) == 4)
      return (V)_mm512_mask_blend_ps(m, (__m512)b, (__m512)a);
    else
      return (V)_mm512_mask_blend_pd(m, (__m512d)b, (__m512d)a);
  }
  PYPERF_HD static V larger(V a, V b) {
    if constexpr (sizeof(R) == 4)
      return (V)_mm512_maskz_max_ps(__mmask16(-1), (__m512)a, (__m512)b);
    else
      return (V)_mm512_maskz_max_pd(__mmask8(-1), (__m512d)a, (__m512d)b);
  }
  PYPERF_HD static V smaller(V a, V b) {
    if constexpr (sizeof(R) == 4)
      return (V)_mm512_maskz_min_ps(__mmask16(-1), (__m512)a, (__m512)b);
    else
      return (V)_mm512_maskz_min_pd(__mmask8(-1), (__m512d)a, (__m512d)b);
  }
  PYPERF_HD static V fma(V a, V b, V c) {
    if constexpr (sizeof(R) == 4)
      return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
    else
      return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  }
  PYPERF_HD static V sqrt(V a) {
    if constexpr (sizeof(R) == 4)
      return (V)_mm512_maskz_sqrt_ps(__mmask16(-1), (__m512)a);
    else
      return (V)_mm512_maskz_sqrt_pd(__mmask8(-1), (__m512d)a);
  }
  PYPERF_HD static V scaled(V v, V n) {
    if constexpr (sizeof(R) == 4)
      return (V)_mm512_maskz_scalef_ps(__mmask16(-1), (__m512)v, (__m512)n);
    else
      return (V)_mm512_maskz_scalef_pd(__mmask8(-1), (__m512d)v, (__m512d)n);
  }
#else
  using Mask = Int;
  PYPERF_HD static Mask less(V a, V b) { return a < b; }
  PYPERF_HD static Mask at_least(V a, V b) { return a >= b; }
  PYPERF_HD static Mask equal(V a, V b) { return a == b; }
  PYPERF_HD static V select(Mask m, V a, V b) { return m ? a : b; }
  PYPERF_HD static V scaled(V v, V n) { return math::scaled_in_steps<VectorMachine>(v, n); }
#if PYPERF_VECTOR_BYTES == 32
  PYPERF_HD static bool all(Mask m) {
    if constexpr (sizeof(R) == 4)
      return _mm256_movemask_ps((__m256)m) == 0xff;
    else
      return _mm256_movemask_pd((__m256d)m) == 0xf;
  }
  PYPERF_HD static V larger(V a, V b) {
    if constexpr (sizeof(R) == 4)
      return (V)_mm256_max_ps((__m256)a, (__m256)b);
    else
      return (V)_mm256_max_pd((__m256d)a, (__m256d)b);
  }
  PYPERF_HD static V smaller(V a, V b) {
    if constexpr (sizeof(R) == 4)
      return (V)_mm256_min_ps((__m256)a, (__m256)b);
    else
      return (V)_mm256_min_pd((__m256d)a, (__m256d)b);
  }
  PYPERF_HD static V fma(V a, V b, V c) {
    if constexpr (sizeof(R) == 4)
      return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
    else
      return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  }
  PYPERF_HD static V sqrt(V a) {
    if constexpr (sizeof(R) == 4)
      return (V)_mm256_sqrt_ps((__m256)a);
    else
      return (V)_mm256_sqrt_pd((__m256d)a);
  }
#else
  PYPERF_HD static bool all(Mask m) {
    for (int i = 0; i < kLanes; ++i)
      if (m[i] == 0) return false;
    return true;
  }
  PYPERF_HD static V larger(V a, V b) { return a > b ? a : b; }
  PYPERF_HD static V smaller(V a, V b) { return a < b ? a : b; }
  PYPERF_HD static V fma(V a, V b, V c) {
    for (int i = 0; i < kLanes; ++i) a[i] = ScalarMachine<R>::fma(a[i], b[i], c[i]);
    return a;
  }
  PYPERF_HD static V sqrt(V a) {
    for (int i = 0; i < kLanes; ++i) a[i] = ScalarMachine<R>::sqrt(a[i]);
    return a;
  }
#endif
#endif

  PYPERF_HD static V load(const R* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  PYPERF_HD static void store(R* p, V v) { memcpy(p, &v, sizeof v); }

  // The first n < kLanes lanes; nothing behind them is touched, and the others are 0.
#if PYPERF_VECTOR_BYTES == 64
  PYPERF_HD static V load_first(const R* p, int64_t n) {
    if constexpr (sizeof(R) == 4)
      return (V)_mm512_maskz_loadu_ps(Mask((1u << n) - 1), p);
    else
      return (V)_mm512_maskz_loadu_pd(Mask((1u << n) - 1), p);
  }
  PYPERF_HD static void store_first(R* p, V v, int64_t n) {
    if constexpr (sizeof(R) == 4)
      _mm512_mask_storeu_ps(p, Mask((1u << n) - 1), (__m512)v);
    else
      _mm512_mask_storeu_pd(p, Mask((1u << n) - 1), (__m512d)v);
  }
#elif PYPERF_VECTOR_BYTES == 32
  PYPERF_HD static Int first(int64_t n) {
    Int lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    return lane < Int_(n);
  }
  PYPERF_HD static V load_first(const R* p, int64_t n) {
    if constexpr (sizeof(R) == 4)
      return (V)_mm256_maskload_ps(p, (__m256i)first(n));
    else
      return (V)_mm256_maskload_pd(p, (__m256i)first(n));
  }
  PYPERF_HD static void store_first(R* p, V v, int64_t n) {
    if constexpr (sizeof(R) == 4)
      _mm256_maskstore_ps(p, (__m256i)first(n), (__m256)v);
    else
      _mm256_maskstore_pd(p, (__m256i)first(n), (__m256d)v);
  }
#else
  PYPERF_HD static V load_first(const R* p, int64_t n) {
    V v = {};
    for (int64_t i = 0; i < n; ++i) v[i] = p[i];
    return v;
  }
  PYPERF_HD static void store_first(R* p, V v, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = v[i];
  }
#endif
};

// Two of a kind, with the operators of one.
template <class T>
struct Two {
  T a, b;
};
#define PYPERF_OPERATOR_OF_TWO(op)                   \
  template <class T>                                 \
  PYPERF_HD Two<T> operator op(Two<T> x, Two<T> y) { \
    return {T(x.a op y.a), T(x.b op y.b)};           \
  }                                                  \
  template <class T, class S>                        \
  PYPERF_HD Two<T> operator op(Two<T> x, S y) {      \
    return {T(x.a op y), T(x.b op y)};               \
  }                                                  \
  template <class T, class S>                        \
  PYPERF_HD Two<T> operator op(S x, Two<T> y) {      \
    return {T(x op y.a), T(x op y.b)};               \
  }
PYPERF_OPERATOR_OF_TWO(+)
PYPERF_OPERATOR_OF_TWO(-)
PYPERF_OPERATOR_OF_TWO(*)
PYPERF_OPERATOR_OF_TWO(/)
PYPERF_OPERATOR_OF_TWO(&)
PYPERF_OPERATOR_OF_TWO(|)
PYPERF_OPERATOR_OF_TWO(<<)
PYPERF_OPERATOR_OF_TWO(>>)
#undef PYPERF_OPERATOR_OF_TWO
template <class T>
PYPERF_HD Two<T> operator-(Two<T> x) {
  return {-x.a, -x.b};
}

// Two values of a machine as one, for code that is one long chain of instructions: a processor works on two such chains
// at a time only where they alternate.
template <class M>
struct PairMachine {
  using R = typename M::R;
  using V = Two<typename M::V>;
  using Int = Two<typename M::Int>;
  using Mask = Two<typename M::Mask>;
  static constexpr int kLanes = 2 * M::kLanes;

  PYPERF_HD static V of(R r) { return {M::of(r), M::of(r)}; }
  PYPERF_HD static Int bits(V a) { return {M::bits(a.a), M::bits(a.b)}; }
  PYPERF_HD static V from_bits(Int i) { return {M::from_bits(i.a), M::from_bits(i.b)}; }
  PYPERF_HD static Mask less(V a, V b) { return {M::less(a.a, b.a), M::less(a.b, b.b)}; }
  PYPERF_HD static Mask at_least(V a, V b) { return {M::at_least(a.a, b.a), M::at_least(a.b, b.b)}; }
  PYPERF_HD static Mask equal(V a, V b) { return {M::equal(a.a, b.a), M::equal(a.b, b.b)}; }
  PYPERF_HD static V select(Mask m, V a, V b) { return {M::select(m.a, a.a, b.a), M::select(m.b, a.b, b.b)}; }
  PYPERF_HD static V larger(V a, V b) { return {M::larger(a.a, b.a), M::larger(a.b, b.b)}; }
  PYPERF_HD static V smaller(V a, V b) { return {M::smaller(a.a, b.a), M::smaller(a.b, b.b)}; }
  PYPERF_HD static V fma(V a, V b, V c) { return {M::fma(a.a, b.a, c.a), M::fma(a.b, b.b, c.b)}; }
  PYPERF_HD static V sqrt(V a) { return {M::sqrt(a.a), M::sqrt(a.b)}; }
  PYPERF_HD static V scaled(V v, V n) { return {M::scaled(v.a, n.a), M::scaled(v.b, n.b)}; }
  PYPERF_HD static V load(const R* p) { return {M::load(p), M::load(p + M::kLanes)}; }
  PYPERF_HD static void store(R* p, V v) { M::store(p, v.a), M::store(p + M::kLanes, v.b); }
};
