// Blocks of as many elements as a vector has lanes, between memory of any dtype and stride and R[]; stamped once for
// each SIMD level (simd_levels.h). Prelude: <algorithm>, that of machine.h, ../common/storage.h.
#include "machine.h"

template <class R, int kLanes>
struct Lanes {
  typedef R Vector __attribute__((vector_size(kLanes * sizeof(R))));
};
template <class R, int kLanes>
using LanesOf = typename Lanes<R, kLanes>::Vector;

// Lanes twice as wide. GCC 12 takes __builtin_convertvector apart where the result is the widest vector there is.
template <int n>
PYPERF_HD LanesOf<uint32_t, n> widened(LanesOf<uint16_t, n> v) {
#if PYPERF_VECTOR_BYTES == 64
  if constexpr (n == 16) return (LanesOf<uint32_t, n>)_mm512_maskz_cvtepu16_epi32(__mmask16(-1), (__m256i)v);
#elif PYPERF_VECTOR_BYTES == 32
  if constexpr (n == 8) return (LanesOf<uint32_t, n>)_mm256_cvtepu16_epi32((__m128i)v);
#endif
  return __builtin_convertvector(v, LanesOf<uint32_t, n>);
}
template <int n>
PYPERF_HD LanesOf<double, n> widened(LanesOf<float, n> v) {
#if PYPERF_VECTOR_BYTES == 64
  if constexpr (n == 8) return (LanesOf<double, n>)_mm512_maskz_cvtps_pd(__mmask8(-1), (__m256)v);
#elif PYPERF_VECTOR_BYTES == 32
  if constexpr (n == 4) return (LanesOf<double, n>)_mm256_cvtps_pd((__m128)v);
#endif
  return __builtin_convertvector(v, LanesOf<double, n>);
}

// n consecutive elements as a vector.
template <class R, int n, class S>
PYPERF_HD LanesOf<R, n> load_lanes(const S* p) {
  LanesOf<R, n> v;
  if constexpr (std::is_same_v<S, BFloat16> && sizeof(R) == 4) {
    LanesOf<uint16_t, n> bits;
    memcpy(&bits, p, sizeof bits);
    return (LanesOf<R, n>)(widened<n>(bits) << 16);
  } else if constexpr (sizeof(S) == 4 && sizeof(R) == 8) {
    LanesOf<float, n> s;
    memcpy(&s, p, sizeof s);
    return widened<n>(s);
#if PYPERF_VECTOR_BYTES >= 32
  } else if constexpr (std::is_same_v<S, Float16> && sizeof(R) == 4 && n == 8) {
    __m128i bits;
    memcpy(&bits, p, sizeof bits);
    return (LanesOf<R, n>)_mm256_cvtph_ps(bits);
#endif
#if PYPERF_VECTOR_BYTES == 64
  } else if constexpr (std::is_same_v<S, Float16> && sizeof(R) == 4 && n == 16) {
    __m256i bits;
    memcpy(&bits, p, sizeof bits);
    return (LanesOf<R, n>)_mm512_maskz_cvtph_ps(__mmask16(-1), bits);
#endif
  } else if constexpr (sizeof(S) == 2) {
    for (int i = 0; i < n; ++i) v[i] = loaded<R>(p[i]);
    return v;
  } else {
    LanesOf<S, n> s;
    memcpy(&s, p, sizeof s);
    return __builtin_convertvector(s, LanesOf<R, n>);
  }
}

// Rounded to BFloat16, whose bits are the upper 16; those below are anything.
template <int n>
PYPERF_HD LanesOf<uint32_t, n> bfloat16_bits(LanesOf<float, n> v) {
  const auto bits = (LanesOf<uint32_t, n>)v;
  const auto rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return v == v ? rounded : LanesOf<uint32_t, n>{} + 0x7fc00000u;
}

// Every second word of a, then of b.
template <int n, int... i>
PYPERF_HD LanesOf<uint16_t, 2 * n> upper_words(LanesOf<uint16_t, 2 * n> a, LanesOf<uint16_t, 2 * n> b,
                                               std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (2 * i + 1)...);
}

template <int n, class R, class S>
PYPERF_HD void store_lanes(LanesOf<R, n> v, S* p) {
  if constexpr (std::is_same_v<S, BFloat16> && sizeof(R) == 4) {
    const auto half = __builtin_convertvector(bfloat16_bits<n>(v) >> 16, LanesOf<uint16_t, n>);
    memcpy(p, &half, sizeof half);
#if PYPERF_VECTOR_BYTES >= 32
  } else if constexpr (std::is_same_v<S, Float16> && sizeof(R) == 4 && n == 8) {
    const __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
    memcpy(p, &half, sizeof half);
#endif
#if PYPERF_VECTOR_BYTES == 64
  } else if constexpr (std::is_same_v<S, Float16> && sizeof(R) == 4 && n == 16) {
    const __m256i half = _mm512_maskz_cvtps_ph(__mmask16(-1), (__m512)v, _MM_FROUND_TO_NEAREST_INT);
    memcpy(p, &half, sizeof half);
#endif
  } else if constexpr (sizeof(S) == 2) {
    for (int i = 0; i < n; ++i) p[i] = stored<S, R>(v[i]);
  } else {
    const auto s = __builtin_convertvector(v, LanesOf<S, n>);
    memcpy(p, &s, sizeof s);
  }
}

// a, then b.
template <int n, class R, class S>
PYPERF_HD void store_two(LanesOf<R, n> a, LanesOf<R, n> b, S* p) {
  if constexpr (std::is_same_v<S, BFloat16> && sizeof(R) == 4) {
    using Words = LanesOf<uint16_t, 2 * n>;
    const auto words = upper_words<n>((Words)bfloat16_bits<n>(a), (Words)bfloat16_bits<n>(b),
                                      std::make_integer_sequence<int, 2 * n>());
    memcpy(p, &words, sizeof words);
  } else {
    store_lanes<n, R>(a, p), store_lanes<n, R>(b, p + n);
  }
}

// Where the elements of a block are: a stride apart, or each at its place in a table.
struct LaneOffsets {
  int64_t stride;
  const int64_t* table;  // null: none
  int64_t pitch;         // of the table
  int64_t first = 0;     // element of the block

  PYPERF_HD int64_t operator[](int64_t i) const { return table ? table[(first + i) * pitch] : (first + i) * stride; }
  PYPERF_HD bool apart_by(int64_t step) const { return !table && stride == step; }
  PYPERF_HD LaneOffsets from(int64_t i) const { return {stride, table, pitch, first + i}; }
};

PYPERF_HD void prefetch(const char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

// out[i] = element i for i in [0, n); the lanes behind repeat the last one.
template <class R, class S>
PYPERF_HD void load_block(const S* p, const LaneOffsets& at, int64_t n, R* out) {
  constexpr int L = VectorMachine<R>::kLanes;
  if (at.apart_by(1) && n == L) {
    const auto v = load_lanes<R, L>(p + at[0]);
    memcpy(out, &v, sizeof v);
    return;
  }
  for (int64_t i = 0; i < L; ++i) out[i] = loaded<R>(p[at[std::min(i, n - 1)]]);
}

template <class R, class S>
PYPERF_HD void store_block(const R* in, const LaneOffsets& at, int64_t n, S* p) {
  constexpr int L = VectorMachine<R>::kLanes;
  if (at.apart_by(1) && n == L) {
    LanesOf<R, L> v;
    memcpy(&v, in, sizeof v);
    store_lanes<L, R>(v, p + at[0]);
    return;
  }
  for (int64_t i = 0; i < n; ++i) p[at[i]] = stored<S, R>(in[i]);
}
