// Torch-free test of kernels/math/normal.h at every SIMD level of this processor: Philox against its published answers,
// normals against long double, the same bits on all levels as from the scalar form that a GPU runs, any part of a draw.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../kernels/common/platform.h"

#define PYPERF_SIMD_BODY "../../tests/native/normal_body.h"
#include "../../kernels/cpu/simd_levels.h"

namespace {

using namespace pyperf;

int passed = 0, failed = 0;
void report(bool ok, const char* what, double got, double want) {
  ok ? ++passed : ++failed;
  if (!ok && failed <= 20) printf("FAILED %s: %.17g where %.17g is right\n", what, got, want);
}

struct Level {
  const char* name;
  int lanes;
  void (*philox)(const uint32_t*, uint64_t, uint32_t*);
  void (*fill)(uint64_t, int64_t, int64_t, int64_t, float*);
};

std::vector<Level> levels() {
  std::vector<Level> found{
      {"scalar", 1, &baseline::philox_scalar, nullptr},
      {"baseline", baseline::kWordLanes, &baseline::philox_vectors, &baseline::fill_normals},
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v3"))
    found.push_back({"x86-64-v3", x86_64_v3::kWordLanes, &x86_64_v3::philox_vectors, &x86_64_v3::fill_normals});
  if (__builtin_cpu_supports("x86-64-v4"))
    found.push_back({"x86-64-v4", x86_64_v4::kWordLanes, &x86_64_v4::philox_vectors, &x86_64_v4::fill_normals});
#endif
  return found;
}

// Of Random123's file of known answers.
struct Known {
  uint32_t counter[4];
  uint64_t key;
  uint32_t words[4];
};
constexpr Known kKnown[] = {
    {{0, 0, 0, 0}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
     0xffffffffffffffff,
     {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     0x299f31d0a4093822,
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
};

void test_philox(const Level& level) {
  for (const Known& k : kKnown) {
    std::vector<uint32_t> words(4 * level.lanes);
    level.philox(k.counter, k.key, words.data());
    for (int i = 0; i < 4 * level.lanes; ++i)
      report(words[i] == k.words[i / level.lanes], level.name, words[i], k.words[i / level.lanes]);
  }
}

void test_pair(uint32_t x, uint32_t y) {
  float even, odd;
  baseline::scalar_pair(x, y, even, odd);
  const long double uniform = (long double)(float(x >> 1) + 0.5f) / 2147483648.0L;
  const long double radius = std::sqrt(-2 * std::log(uniform)), angle = 2 * std::acos(-1.0L) * y / 4294967296.0L;
  // Absolute: an angle's error of 2^-27 turns counts where a normal is near 0.
  const double bound = 2e-7 * double(radius) + 1e-9;
  report(std::fabs(even - radius * std::cos(angle)) <= bound, "cosine", even, double(radius * std::cos(angle)));
  report(std::fabs(odd - radius * std::sin(angle)) <= bound, "sine", odd, double(radius * std::sin(angle)));
}

void test_fill(const Level& level, std::mt19937_64& generator, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const uint64_t key = generator();
    const int64_t draw = int64_t(generator()) >> (generator() % 64), groups = 1 + int64_t(generator() % 4);
    const int64_t first_group =
        round % 3 == 0 ? (int64_t(1) << 30) + int64_t(generator() % 100) : int64_t(generator() % 3);
    std::vector<float> whole(128 * groups), got(128 * groups + 2, 7.0f);
    for (int64_t g = 0; g < groups; ++g) baseline::scalar_group(key, draw, first_group + g, &whole[128 * g]);
    const int64_t begin = int64_t(generator() % whole.size()),
                  count = int64_t(generator() % (whole.size() - begin + 1));
    level.fill(key, draw, 128 * first_group + begin, count, got.data() + 1);
    bool same = got[0] == 7.0f && got[1 + count] == 7.0f;
    for (int64_t i = 0; i < count; ++i) same = same && std::memcmp(&got[1 + i], &whole[begin + i], 4) == 0;
    report(same, level.name, double(begin), double(count));
  }
}

// Sums of powers of many normals, which are within 5 deviations of those of a normal distribution.
void test_moments() {
  constexpr int64_t n = 1 << 20;
  std::vector<float> v(n);
  baseline::fill_normals(12345, 0, 0, n, v.data());
  double sums[4] = {}, neighbours = 0;
  for (int64_t i = 0; i < n; ++i) {
    double power = 1;
    for (double& sum : sums) sum += power *= v[i];
    if (i) neighbours += double(v[i]) * v[i - 1];
  }
  const double means[] = {0, 1, 0, 3}, variances[] = {1, 2, 15, 96};
  for (int k = 0; k < 4; ++k)
    report(std::fabs(sums[k] / n - means[k]) < 5 * std::sqrt(variances[k] / n), "moment", sums[k] / n, means[k]);
  report(std::fabs(neighbours / n) < 5 / std::sqrt(double(n)), "correlation", neighbours / n, 0);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 100;
  std::mt19937_64 generator(1);
  for (const Level& level : levels()) {
    test_philox(level);
    if (level.fill) test_fill(level, generator, 5 * rounds);
  }
  for (uint32_t x : {0u, 1u, 2u, 3u, 0x7fffffffu, 0x80000000u, 0xfffffffeu, 0xffffffffu})
    for (uint32_t eighth = 0; eighth < 8; ++eighth)
      for (int d = -2; d <= 2; ++d) test_pair(x, (eighth << 29) + uint32_t(d));
  for (int i = 0; i < 500 * rounds; ++i) test_pair(uint32_t(generator()), uint32_t(generator()));
  test_moments();
  printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}
