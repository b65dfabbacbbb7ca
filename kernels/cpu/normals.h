// Arrays of standard normals. Stamped once for each SIMD level (simd_levels.h), after machine.h; prelude: <algorithm>.
#include "../math/normal.h"

template <>
struct Words<VectorMachine<float>> {
  using M = VectorMachine<float>;
  typedef uint32_t Word __attribute__((vector_size(PYPERF_VECTOR_BYTES)));
  typedef uint64_t Half __attribute__((vector_size(PYPERF_VECTOR_BYTES)));
  // Lanes 0, 2, ..., and 1, 3, ...: only this way round does a product of words take one instruction.
  struct Wide {
    Half even, odd;

    PYPERF_HD friend Wide operator^(Wide a, Wide b) { return {a.even ^ b.even, a.odd ^ b.odd}; }
  };

  PYPERF_HD static Half product(Half a, uint32_t w) {
    const Half b = Half{} + w;
#if PYPERF_VECTOR_BYTES == 64
    return (Half)_mm512_maskz_mul_epu32(__mmask8(-1), (__m512i)a, (__m512i)b);
#elif PYPERF_VECTOR_BYTES == 32
    return (Half)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
    return (Half)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xffffffffu) * b;
#endif
  }

  PYPERF_HD static Wide of(uint32_t w) { return {Half{} + w, Half{} + w}; }
  PYPERF_HD static Wide from(uint32_t w) {
    Half lane;
    for (int i = 0; i < M::kLanes / 2; ++i) lane[i] = uint64_t(2 * i);
    return {lane + w, lane + w + 1u};
  }
  PYPERF_HD static Wide product(Wide a, uint32_t w) { return {product(a.even, w), product(a.odd, w)}; }
  PYPERF_HD static Wide upper(Wide a) { return {a.even >> 32, a.odd >> 32}; }
  PYPERF_HD static Word narrow(Wide a) { return (Word)((a.even & 0xffffffffu) | (a.odd << 32)); }
  PYPERF_HD static Word signs(Word a) { return (Word)((typename M::Int)a >> 31); }
  PYPERF_HD static M::V converted(Word a) { return __builtin_convertvector((typename M::Int)a, M::V); }
  PYPERF_HD static Word bits(M::V v) { return (Word)v; }
  PYPERF_HD static M::V from_bits(Word a) { return (M::V)a; }
};

constexpr int64_t kNormalsInGroup = 128;

// Elements [128 group, 128 (group + 1)): first words, then normals, as both are long chains of instructions, and a
// processor looks too few instructions ahead for several at a time of one after the other.
PYPERF_HD void fill_group_of_normals(uint64_t key, int64_t draw, int64_t group, float* out) {
  using M = VectorMachine<float>;
  constexpr int kVectors = 32 / M::kLanes;
  Words<M>::Word words[kVectors][4];
  for (int i = 0; i < kVectors; ++i)
    math::words_of_block<M>(key, draw, uint64_t(group) * 32 + uint64_t(i * M::kLanes), words[i]);
  for (int i = 0; i < kVectors; ++i)
    for (int pair = 0; pair < 4; pair += 2) {
      M::V even, odd;
      math::normal_pair<M>(words[i][pair], words[i][pair + 1], even, odd);
      M::store(out + pair * 32 + i * M::kLanes, even);
      M::store(out + (pair + 1) * 32 + i * M::kLanes, odd);
    }
}

// Elements [begin, begin + count) of a draw for the sample with this key.
inline void fill_normals(uint64_t key, int64_t draw, int64_t begin, int64_t count, float* out) {
  int64_t group = begin / kNormalsInGroup, skipped = begin % kNormalsInGroup;
  while (count > 0) {
    if (skipped == 0 && count >= kNormalsInGroup) {
      const int64_t whole = count / kNormalsInGroup;
      for (int64_t i = 0; i < whole; ++i) fill_group_of_normals(key, draw, group + i, out + i * kNormalsInGroup);
      group += whole, out += whole * kNormalsInGroup, count -= whole * kNormalsInGroup;
    } else {
      float buffer[kNormalsInGroup];
      fill_group_of_normals(key, draw, group, buffer);
      const int64_t n = std::min(kNormalsInGroup - skipped, count);
      memcpy(out, buffer + skipped, size_t(n) * sizeof(float));
      ++group, out += n, count -= n, skipped = 0;
    }
  }
}
