// Parameters of as many elements as a vector of R has lanes, between memory and R[], where parameter j of element i is
// at [j * pitch + i]; stamped once for each SIMD level (simd_levels.h). Prelude: that of elements.h, <utility>.
//
// As a rule an element's parameters are neighbours, a row, and some columns of L rows are turned at a time. A vector
// then starts as pieces of several rows, so that most of the turning is done within 128 bits.
#include "elements.h"

// How lanes of a and b make one vector, Q of them in 128 bits: alternating, from the lower or the upper half of each
// 128 bits; the same of pairs of lanes; 128 bits of a and b alternating; the 128 bits of even number, or of odd.
enum class Mix { low, high, low_pairs, high_pairs, low_quarters, high_quarters, even_quarters, odd_quarters };

template <Mix kMix, int W, int Q>
constexpr int mixed_lane(int lane) {
  const int quarter = lane / Q, in = lane % Q, quarters = W / Q;
  switch (kMix) {
    case Mix::low: return in % 2 * W + quarter * Q + in / 2;
    case Mix::high: return in % 2 * W + quarter * Q + in / 2 + Q / 2;
    case Mix::low_pairs: return in / 2 * W + quarter * Q + in % 2;
    case Mix::high_pairs: return in / 2 * W + quarter * Q + in % 2 + 2;
    case Mix::low_quarters: return quarter % 2 * W + quarter / 2 * Q + in;
    case Mix::high_quarters: return quarter % 2 * W + (quarter + quarters) / 2 * Q + in;
    case Mix::even_quarters: return 2 * quarter / quarters * W + 2 * quarter % quarters * Q + in;
    case Mix::odd_quarters: return 2 * quarter / quarters * W + (2 * quarter % quarters + 1) * Q + in;
  }
  return 0;
}
template <Mix kMix, int W, int Q, class V, size_t... kLane>
PYPERF_HD V mixed(V a, V b, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(a, b, mixed_lane<kMix, W, Q>(int(kLane))...);
}
template <Mix kMix, class R, class V>
PYPERF_HD V mixed(V a, V b) {
  constexpr int W = int(sizeof(V) / sizeof(R));
  return mixed<kMix, W, 16 / int(sizeof(R))>(a, b, std::make_index_sequence<W>());
}

// Lane j of v[i] and lane i of v[j] change places, in each 128 bits.
template <class R, class V>
PYPERF_HD void turn_quarters(V* v) {
  if constexpr (sizeof(R) == 8) {
    const V low = mixed<Mix::low, R>(v[0], v[1]);
    v[1] = mixed<Mix::high, R>(v[0], v[1]);
    v[0] = low;
  } else {
    const V a = mixed<Mix::low, R>(v[0], v[1]), b = mixed<Mix::high, R>(v[0], v[1]);
    const V c = mixed<Mix::low, R>(v[2], v[3]), d = mixed<Mix::high, R>(v[2], v[3]);
    v[0] = mixed<Mix::low_pairs, R>(a, c), v[1] = mixed<Mix::high_pairs, R>(a, c);
    v[2] = mixed<Mix::low_pairs, R>(b, d), v[3] = mixed<Mix::high_pairs, R>(b, d);
  }
}

// v with another piece number k, and that piece.
template <int k, class V, class Piece>
PYPERF_HD V with_piece(V v, Piece piece) {
#if PYPERF_VECTOR_BYTES == 64
  if constexpr (sizeof(Piece) == 32) return (V)_mm512_insertf32x8((__m512)v, (__m256)piece, k);
  if constexpr (sizeof(Piece) == 16) return (V)_mm512_insertf32x4((__m512)v, (__m128)piece, k);
#elif PYPERF_VECTOR_BYTES == 32
  if constexpr (sizeof(Piece) == 16) return (V)_mm256_insertf128_ps((__m256)v, (__m128)piece, k);
#endif
  memcpy(reinterpret_cast<char*>(&v) + k * sizeof piece, &piece, sizeof piece);
  return v;
}
template <int k, class Piece, class V>
PYPERF_HD Piece piece_of(V v) {
#if PYPERF_VECTOR_BYTES == 64
  constexpr __mmask8 kAll = -1;
  if constexpr (sizeof(Piece) == 32) return (Piece)_mm512_maskz_extractf32x8_ps(kAll, (__m512)v, k);
  if constexpr (sizeof(Piece) == 16) return (Piece)_mm512_maskz_extractf32x4_ps(kAll, (__m512)v, k);
#elif PYPERF_VECTOR_BYTES == 32
  if constexpr (sizeof(Piece) == 16) return (Piece)_mm256_extractf128_ps((__m256)v, k);
#endif
  Piece piece;
  memcpy(&piece, reinterpret_cast<const char*>(&v) + k * sizeof piece, sizeof piece);
  return piece;
}

// What is turned: words, each one parameter of type S, or two where S has 16 bits. L rows of kHalves * kWidth words
// are turned as W rows of kWidth, those behind the L-th being the other half of them.
template <class S, int L, int kWidth>
struct Turned {
  using Word = std::conditional_t<sizeof(S) == 8, double, float>;
  static constexpr int W = VectorMachine<Word>::kLanes, Q = 16 / int(sizeof(Word));
  static constexpr int kParts = int(sizeof(Word) / sizeof(S)), kHalves = W / L, kPieces = W / kWidth;
  static constexpr int kColumns = kWidth * kParts * kHalves;
  using V = LanesOf<Word, W>;
  using Piece = LanesOf<Word, kWidth>;
  using Pieces = std::make_integer_sequence<int, kPieces>;

  // v[i] has pieces of these of the W rows.
  static constexpr int row(int i, int piece) { return i % Q + (i / Q * kPieces + piece) * Q; }
  static constexpr int offset(int row) { return row / L * kWidth * kParts; }
};

// A word's parameters as numbers: part 0 is the first in memory.
template <class S, class Word, class V>
PYPERF_HD void to_numbers(V words, V (&numbers)[sizeof(Word) / sizeof(S)]) {
  constexpr int W = int(sizeof(V) / sizeof(Word));
  if constexpr (sizeof(S) == sizeof(Word)) {
    numbers[0] = words;
  } else {
    const auto bits = (LanesOf<uint32_t, W>)words;
    if constexpr (std::is_same_v<S, BFloat16>) {
      numbers[0] = (V)(bits << 16), numbers[1] = (V)(bits & 0xffff0000u);
    } else {
      const LanesOf<uint16_t, W> halves[] = {__builtin_convertvector(bits & 0xffffu, LanesOf<uint16_t, W>),
                                             __builtin_convertvector(bits >> 16, LanesOf<uint16_t, W>)};
      for (int part = 0; part < 2; ++part)
        numbers[part] = load_lanes<float, W>(reinterpret_cast<const Float16*>(&halves[part]));
    }
  }
}
template <class S, class Word, class V>
PYPERF_HD V to_words(const V (&numbers)[sizeof(Word) / sizeof(S)]) {
  constexpr int W = int(sizeof(V) / sizeof(Word));
  if constexpr (sizeof(S) == sizeof(Word)) {
    return numbers[0];
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    return (V)(bfloat16_bits<W>(numbers[0]) >> 16 | (bfloat16_bits<W>(numbers[1]) & 0xffff0000u));
  } else {
    LanesOf<uint16_t, W> halves[2];
    for (int part = 0; part < 2; ++part)
      store_lanes<W, float>(numbers[part], reinterpret_cast<Float16*>(&halves[part]));
    return (V)(__builtin_convertvector(halves[0], LanesOf<uint32_t, W>) |
               __builtin_convertvector(halves[1], LanesOf<uint32_t, W>) << 16);
  }
}

template <class T, class S, class Word, int L, int... k>
PYPERF_HD void load_columns(const S* const (&rows)[L], int64_t first, Word* out, int64_t pitch,
                            std::integer_sequence<int, k...>) {
  using V = typename T::V;
  constexpr int kWidth = T::W / T::kPieces, Q = T::Q;
  V v[kWidth];
  const auto piece = [&](int row) __attribute__((always_inline)) {
    typename T::Piece p;
    memcpy(&p, rows[row % L] + first + T::offset(row), sizeof p);
    return p;
  };
  for (int i = 0; i < kWidth; ++i) {
    v[i] = V{};
    ((v[i] = with_piece<k>(v[i], piece(T::row(i, k)))), ...);
  }
  if constexpr (kWidth == 2 * Q)
    for (int i = 0; i < Q; ++i) {
      const V even = mixed<Mix::even_quarters, Word>(v[i], v[i + Q]);
      v[i + Q] = mixed<Mix::odd_quarters, Word>(v[i], v[i + Q]);
      v[i] = even;
    }
  for (int i = 0; i < kWidth; i += Q) turn_quarters<Word>(v + i);
  for (int i = 0; i < kWidth; ++i) {
    V numbers[T::kParts];
    to_numbers<S, Word>(v[i], numbers);
    for (int part = 0; part < T::kParts; ++part) {
      const auto low = piece_of<0, LanesOf<Word, L>>(numbers[part]);
      memcpy(out + (first + i * T::kParts + part) * pitch, &low, sizeof low);
      if constexpr (T::kHalves == 2) {
        const auto high = piece_of<1, LanesOf<Word, L>>(numbers[part]);
        memcpy(out + (first + (kWidth + i) * T::kParts + part) * pitch, &high, sizeof high);
      }
    }
  }
}

// kGroups times the columns, each row's together: memory gets its cache lines as whole as they can be.
template <class T, int kGroups, class S, class Word, int L, int... k>
PYPERF_HD void store_columns(const Word* in, int64_t pitch, int64_t first, S* const (&rows)[L],
                             std::integer_sequence<int, k...>) {
  using V = typename T::V;
  constexpr int kWidth = T::W / T::kPieces, Q = T::Q;
  V groups[kGroups][kWidth];
  for (int g = 0; g < kGroups; ++g) {
    V* const v = groups[g];
    for (int i = 0; i < kWidth; ++i) {
      V numbers[T::kParts];
      for (int part = 0; part < T::kParts; ++part) {
        const Word* const from = in + (first + g * T::kColumns + i * T::kParts + part) * pitch;
        LanesOf<Word, L> half;
        memcpy(&half, from, sizeof half);
        numbers[part] = with_piece<0>(V{}, half);
        if constexpr (T::kHalves == 2) {
          memcpy(&half, from + kWidth * T::kParts * pitch, sizeof half);
          numbers[part] = with_piece<1>(numbers[part], half);
        }
      }
      v[i] = to_words<S, Word>(numbers);
    }
    for (int i = 0; i < kWidth; i += Q) turn_quarters<Word>(v + i);
    if constexpr (kWidth == 2 * Q)
      for (int i = 0; i < Q; ++i) {
        const V low = mixed<Mix::low_quarters, Word>(v[i], v[i + Q]);
        v[i + Q] = mixed<Mix::high_quarters, Word>(v[i], v[i + Q]);
        v[i] = low;
      }
  }
  const auto store = [&](int row, int g, typename T::Piece piece) __attribute__((always_inline)) {
    memcpy(rows[row % L] + first + g * T::kColumns + T::offset(row), &piece, sizeof piece);
  };
  for (int start = 0; start < kWidth; start += Q)
    (
        [&]() __attribute__((always_inline)) {
          for (int i = start; i < start + Q; ++i)
            for (int g = 0; g < kGroups; ++g) store(T::row(i, k), g, piece_of<k, typename T::Piece>(groups[g][i]));
        }(),
        ...);
}

// Whether rows are long enough.
template <class R, class S>
constexpr bool can_turn(int64_t count) {
  using Word = typename Turned<S, VectorMachine<R>::kLanes, 1>::Word;
  return count >= Turned<S, VectorMachine<R>::kLanes, 16 / int(sizeof(Word))>::kColumns;
}

// out[j * pitch + i] is parameter j of row i. The last columns may be done twice.
template <int L, class S, class Word>
PYPERF_HD void load_rows(const S* p, const LaneOffsets& at, int64_t count, int64_t n, Word* out, int64_t pitch) {
  constexpr int Q = 16 / int(sizeof(Word)), W = VectorMachine<Word>::kLanes;
  using Narrow = Turned<S, L, Q>;
  using Wide = Turned<S, L, (W == 4 * Q ? 2 : 1) * Q>;
  const S* rows[L];
  for (int i = 0; i < L; ++i) rows[i] = p + at[std::min<int64_t>(i, n - 1)];  // rows behind the n-th repeat it
  for (int64_t first = 0; first < count;) {
    const int64_t rest = count - first;
    if (rest > Narrow::kColumns && count >= Wide::kColumns) {
      load_columns<Wide>(rows, std::min(first, count - Wide::kColumns), out, pitch, typename Wide::Pieces());
      first += Wide::kColumns;
    } else {
      load_columns<Narrow>(rows, std::min(first, count - Narrow::kColumns), out, pitch, typename Narrow::Pieces());
      first += Narrow::kColumns;
    }
  }
}
template <int L, class S, class Word>
PYPERF_HD void store_rows(const Word* in, int64_t pitch, const LaneOffsets& at, int64_t count, S* p) {
  constexpr int Q = 16 / int(sizeof(Word)), W = VectorMachine<Word>::kLanes;
  using Narrow = Turned<S, L, Q>;
  using Wide = Turned<S, L, (W == 4 * Q ? 2 : 1) * Q>;
  S* rows[L];
  for (int i = 0; i < L; ++i) rows[i] = p + at[i];
  for (int64_t first = 0; first < count;) {
    const int64_t rest = count - first;
    if (rest >= 2 * Wide::kColumns) {
      store_columns<Wide, 2>(in, pitch, first, rows, typename Wide::Pieces());
      first += 2 * Wide::kColumns;
    } else if (rest > Narrow::kColumns && count >= Wide::kColumns) {
      store_columns<Wide, 1>(in, pitch, std::min(first, count - Wide::kColumns), rows, typename Wide::Pieces());
      first += Wide::kColumns;
    } else {
      store_columns<Narrow, 1>(in, pitch, std::min(first, count - Narrow::kColumns), rows, typename Narrow::Pieces());
      first += Narrow::kColumns;
    }
  }
}

// Of n elements; lanes behind the n-th repeat it.
template <class R, class S>
void load_parameters(const S* p, const LaneOffsets& at, int64_t stride, int64_t count, int64_t n, R* out,
                     int64_t pitch) {
  constexpr int L = VectorMachine<R>::kLanes;
  if (stride == 1 && !at.apart_by(1) && can_turn<R, S>(count)) {
    if constexpr (sizeof(R) > sizeof(float) && sizeof(S) < sizeof(R)) {
      float* const numbers = reinterpret_cast<float*>(out) + L;  // the upper halves of their places
      load_rows<L>(p, at, count, n, numbers, 2 * pitch);
      for (int64_t j = 0; j < count; ++j) {
        const auto v = load_lanes<R, L>(numbers + j * 2 * pitch);
        memcpy(out + j * pitch, &v, sizeof v);
      }
    } else {
      load_rows<L>(p, at, count, n, out, pitch);
    }
    return;
  }
  for (int64_t j = 0; j < count; ++j) load_block(p + j * stride, at, n, out + j * pitch);
}
// in: of no use afterwards
template <class R, class S>
void store_parameters(R* in, int64_t pitch, const LaneOffsets& at, int64_t stride, int64_t count, int64_t n, S* p) {
  constexpr int L = VectorMachine<R>::kLanes;
  if (stride == 1 && !at.apart_by(1) && n == L && can_turn<R, S>(count)) {
    if constexpr (sizeof(R) > sizeof(float) && sizeof(S) < sizeof(R)) {
      float* const numbers = reinterpret_cast<float*>(in);
      for (int64_t j = 0; j < count; ++j) {
        LanesOf<R, L> v;
        memcpy(&v, in + j * pitch, sizeof v);
        store_lanes<L, R>(v, numbers + j * 2 * pitch);
      }
      store_rows<L>(numbers, 2 * pitch, at, count, p);
    } else {
      store_rows<L>(in, pitch, at, count, p);
    }
    return;
  }
  for (int64_t j = 0; j < count; ++j) store_block(in + j * pitch, at, n, p + j * stride);
}
