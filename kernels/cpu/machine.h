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

  PYPERF_HD static V of(R r) { return V{} + r; }
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
