// Standard normals without a state: element e of a draw depends on the sample's key, the number of the draw and e
// alone, with the same bits on every machine. Stamped like elementary.h, after it.
//
// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3, 2011) makes four words of a
// key and a counter of four words, low ones first: the number of the block, 64 bits, and the draw, 64 bits. Box-Muller
// makes four normals of the four words. Element e is number (e % 128) / 32 of the four of block (e / 128) * 32 + e %
// 32, so that the elements of a vector come from neighbouring blocks.
//
// Words<M> is a machine's 32-bit unsigned integers:
//   Word               one a lane: a uint32_t, or a vector of them
//   Wide               one a lane in the lower half of 64 bits, above which is anything
//   of(w), from(w)     the same in all lanes; w, w + 1, ...
//   product(a, w)      64 bits of a lane's word times w
//   upper(a)           the upper half of the 64 bits
//   narrow(a)          as Word
//   signs(a)           all ones where the top bit of a Word is set, else 0
//   converted(a)       a Word as int32_t, rounded to float
//   bits, from_bits    those of a value
template <class M>
struct Words;

template <>
struct Words<ScalarMachine<float>> {
  using M = ScalarMachine<float>;
  using Word = uint32_t;
  using Wide = uint64_t;

  PYPERF_HD static Wide of(uint32_t w) { return w; }
  PYPERF_HD static Wide from(uint32_t w) { return w; }
  PYPERF_HD static Wide product(Wide a, uint32_t w) {
#if defined(__CUDA_ARCH__)
    Wide wide;  // nvcc adds the product of the upper halves, which are 0
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(wide) : "r"(uint32_t(a)), "r"(w));
    return wide;
#else
    return uint64_t(uint32_t(a)) * w;
#endif
  }
  PYPERF_HD static Wide upper(Wide a) { return a >> 32; }
  PYPERF_HD static Word narrow(Wide a) { return Word(a); }
  PYPERF_HD static Word signs(Word a) { return Word(int32_t(a) >> 31); }
  PYPERF_HD static float converted(Word a) { return float(int32_t(a)); }
  PYPERF_HD static Word bits(float v) { return Word(M::bits(v).value); }
  PYPERF_HD static float from_bits(Word a) { return M::from_bits(int32_t(a)); }
};

namespace math {

template <class M>
PYPERF_HD void philox(typename Words<M>::Wide (&counter)[4], uint64_t key) {
  using W = Words<M>;
  uint32_t low = uint32_t(key), high = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const auto first = W::product(counter[0], 0xd2511f53u), second = W::product(counter[2], 0xcd9e8d57u);
    counter[0] = W::upper(second) ^ (counter[1] ^ W::of(low));
    counter[1] = second;
    counter[2] = W::upper(first) ^ (counter[3] ^ W::of(high));
    counter[3] = first;
    low += 0x9e3779b9u, high += 0xbb67ae85u;
  }
}

// sqrt(-2 log u) times cos(2 pi v) and sin(2 pi v), with
//   u = (float(x >> 1) + 1/2) / 2^31, in float: 2^-32 <= u <= 1;
//   v = y / 2^32 = quadrant / 4 + turn: |turn| <= 1/8, rounded to float (y - quadrant * 2^30 as int32_t, which is
//   exact).
// At most 6.7 from 0.
template <class M>
PYPERF_HD void normal_pair(typename Words<M>::Word x, typename Words<M>::Word y, Value<M>& even, Value<M>& odd) {
  using W = Words<M>;
  const auto radius = M::sqrt(log_of_normal<M>(W::converted(x >> 1) + 0.5f, M::of(-31.0f)) * -2.0f);

  const auto rounded = y + 0x20000000u;  // its top two bits are the quadrant
  const auto turn = W::converted(y - (rounded & 0xc0000000u)) * 0x1p-32f;
  const auto square = turn * turn;
  const auto sine = M::fma(
      turn, M::of(6.28318548f),  // which is 1.75e-7 more than 2 pi
      turn * polynomial<M>(square, -1.9519183069860446e-07, -41.3416633605957, 81.59268951416016, -75.40755462646484));
  const auto cosine =
      polynomial<M>(square, 1, -19.739208221435547, 64.93915557861328, -85.42615509033203, 58.69950485229492);
  // An odd quadrant swaps them, quadrants 1 and 2 negate the cosine, 2 and 3 the sine.
  const auto swapped = (W::bits(sine) ^ W::bits(cosine)) & W::signs(rounded << 1);
  even = radius * W::from_bits(W::bits(cosine) ^ swapped ^ ((rounded + 0x40000000u) & 0x80000000u));
  odd = radius * W::from_bits(W::bits(sine) ^ swapped ^ (rounded & 0x80000000u));
}

// The four words of each of M::kLanes blocks, of which the first has a number that they divide.
template <class M>
PYPERF_HD void words_of_block(uint64_t key, int64_t draw, uint64_t block, typename Words<M>::Word (&words)[4]) {
  using W = Words<M>;
  typename W::Wide wide[4] = {W::from(uint32_t(block)), W::of(uint32_t(block >> 32)), W::of(uint32_t(draw)),
                              W::of(uint32_t(uint64_t(draw) >> 32))};
  philox<M>(wide, key);
  for (int i = 0; i < 4; ++i) words[i] = W::narrow(wide[i]);
}

// The four normals of each.
template <class M>
PYPERF_HD void normals_of_block(uint64_t key, int64_t draw, uint64_t block, Value<M> (&normals)[4]) {
  typename Words<M>::Word words[4];
  words_of_block<M>(key, draw, block, words);
  normal_pair<M>(words[0], words[1], normals[0], normals[1]);
  normal_pair<M>(words[2], words[3], normals[2], normals[3]);
}

}  // namespace math
