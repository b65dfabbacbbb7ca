// Words and normals of kernels/cpu/normals.h, for normal_cpu.cpp; stamped once for each SIMD level.
#include "../../kernels/cpu/machine.h"
//
#include "../../kernels/cpu/normals.h"

constexpr int kWordLanes = VectorMachine<float>::kLanes;

template <class M>
PYPERF_HD void philox_of(const uint32_t* counter, uint64_t key, typename Words<M>::Word (&words)[4]) {
  using W = Words<M>;
  typename W::Wide wide[4] = {W::of(counter[0]), W::of(counter[1]), W::of(counter[2]), W::of(counter[3])};
  math::philox<M>(wide, key);
  for (int i = 0; i < 4; ++i) words[i] = W::narrow(wide[i]);
}

// The four words of one counter in every lane: [4, lanes].
inline void philox_vectors(const uint32_t* counter, uint64_t key, uint32_t* out) {
  Words<VectorMachine<float>>::Word words[4];
  philox_of<VectorMachine<float>>(counter, key, words);
  memcpy(out, words, sizeof words);
}
inline void philox_scalar(const uint32_t* counter, uint64_t key, uint32_t* out) {
  Words<ScalarMachine<float>>::Word words[4];
  philox_of<ScalarMachine<float>>(counter, key, words);
  memcpy(out, words, sizeof words);
}

// [4 normals, 32 blocks] of a group, one block at a time as a GPU makes them.
inline void scalar_group(uint64_t key, int64_t draw, int64_t group, float* out) {
  for (int lane = 0; lane < 32; ++lane) {
    float normals[4];
    math::normals_of_block<ScalarMachine<float>>(key, draw, uint64_t(group) * 32 + uint64_t(lane), normals);
    for (int i = 0; i < 4; ++i) out[i * 32 + lane] = normals[i];
  }
}

inline void scalar_pair(uint32_t x, uint32_t y, float& even, float& odd) {
  math::normal_pair<ScalarMachine<float>>(x, y, even, odd);
}
