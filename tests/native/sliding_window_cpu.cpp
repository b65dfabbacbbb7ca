// Torch-free test of kernels/cpu/sliding_window*.h at every SIMD level of this processor, for sanitizers:
//   c++ -std=c++17 -O1 -fsanitize=address,undefined -DPYPERF_TEST_KEY_BYTES=4 sliding_window_cpu.cpp -lpthread
// Random problems against brute force. Every buffer has its exact size, and what must not be written keeps its poison.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "../../kernels/cpu/sliding_window_winners.h"

namespace pyperf {
using namespace sliding_window;
}
#define PYPERF_BLOCK_BYTES (1 << 10)  // windows of some thousand elements are huge ones here
#define PYPERF_BUFFER_BYTES (4 << 10)
#define PYPERF_SIMD_BODY "sliding_window.h"  // those in kernels/cpu
#include "../../kernels/cpu/simd_levels.h"
#undef PYPERF_SIMD_BODY
#define PYPERF_SIMD_BODY "sliding_window_chunks.h"
#include "../../kernels/cpu/simd_levels.h"

#ifndef PYPERF_TEST_KEY_BYTES
#define PYPERF_TEST_KEY_BYTES 4
#endif

namespace {

using namespace pyperf;

int passed = 0, failed = 0;
std::mt19937_64 generator(20240607);

int64_t uniform(int64_t low, int64_t high) { return low + int64_t(generator() % uint64_t(high - low + 1)); }
template <class T>
T pick(std::initializer_list<T> choices) {
  return choices.begin()[uniform(0, int64_t(choices.size()) - 1)];
}
void report(bool ok, const std::string& what) {
  ok ? ++passed : ++failed;
  if (!ok && failed <= 20) printf("FAILED %s\n", what.c_str());
}

// Stands in for torch's threads: pieces of any size, on two threads, with scratch memory of exactly the size asked for.
struct Pieces {
  template <class Body>
  void operator()(int64_t count, int64_t grain, int64_t scratch_bytes, const Body& body) const {
    const int64_t piece =
        uniform(0, 1) ? count : std::max<int64_t>(1, uniform(1, std::max<int64_t>(1, std::min(grain, count))));
    const auto every_second = [&](int64_t first) {
      for (int64_t begin = first * piece; begin < count; begin += 2 * piece) {
        void* scratch = nullptr;
        if (posix_memalign(&scratch, 64, size_t(scratch_bytes))) abort();
        memset(scratch, 0xa5, size_t(scratch_bytes));
        body(begin, std::min(count, begin + piece), static_cast<char*>(scratch));
        free(scratch);
      }
    };
    std::thread other(every_second, 1);
    every_second(0);
    other.join();
  }
};

struct Level {
  const char* name;
  bool here;
};
#if defined(__x86_64__)
const Level kLevels[] = {{"baseline", true},
                         {"x86-64-v3", bool(__builtin_cpu_supports("x86-64-v3"))},
                         {"x86-64-v4", bool(__builtin_cpu_supports("x86-64-v4"))}};
#else
const Level kLevels[] = {{"baseline", true}};
#endif

// check(level, its name), for those that this processor has.
template <class Check>
void at_every_level(const Check& check) {
  for (int level = 0; level < int(std::size(kLevels)); ++level)
    if (kLevels[level].here) check(level, std::string(kLevels[level].name));
}

template <class Key>
void extrema_at(int level, const Extrema<Key>& p) {
  if (level == 0) baseline::extrema(p, Pieces());
#if defined(__x86_64__)
  if (level == 1) x86_64_v3::extrema(p, Pieces());
  if (level == 2) x86_64_v4::extrema(p, Pieces());
#endif
}

struct Chunks {
  int level;
#if defined(__x86_64__)
#define AT_LEVEL(...) \
  (level == 2 ? &x86_64_v4::__VA_ARGS__ : level == 1 ? &x86_64_v3::__VA_ARGS__ : &baseline::__VA_ARGS__)
#else
#define AT_LEVEL(...) (&baseline::__VA_ARGS__)
#endif
  template <class A, class T, class Out, class Offset>
  SumChunk<A, T, Out, Offset> sum_chunk() const {
    return AT_LEVEL(sum_chunk<A, T, Out, Offset>);
  }
  template <class Bits, class Offset>
  auto gather_stretch() const {
    return AT_LEVEL(gather_stretch<Bits, Offset>);
  }
  template <class Offset>
  auto index_stretch() const {
    return AT_LEVEL(index_stretch<Offset>);
  }
};

// One operand, [rows, along, lanes] with gaps, in a buffer that ends with its last element.
template <class T>
struct Operand {
  int64_t rows, along, lanes, stride, row_stride;
  std::vector<T> memory;

  Operand(int64_t rows, int64_t along, int64_t lanes, bool dense) : rows(rows), along(along), lanes(lanes) {
    stride = lanes + (dense ? 0 : uniform(0, 2));
    row_stride = along * stride + (dense ? 0 : uniform(0, 3));
    const int64_t last = rows && along && lanes ? at(rows - 1, along - 1, lanes - 1) + 1 : 0;
    T poison;
    memset(static_cast<void*>(&poison), 0xcd, sizeof poison);
    memory.assign(size_t(last), poison);
  }
  int64_t at(int64_t row, int64_t i, int64_t lane) const { return row * row_stride + i * stride + lane; }
  T& operator()(int64_t row, int64_t i, int64_t lane) { return memory[size_t(at(row, i, lane))]; }
};

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <int N>
StridedRows<N> rows_of(int64_t count, const int64_t (&strides)[N]) {
  StridedRows<N> rows{};
  rows.count = count;
  rows.dims = 1;
  rows.size[0] = count;
  for (int n = 0; n < N; ++n) rows.stride[n][0] = strides[n];
  return rows;
}

struct Problem {
  Windows w;
  int64_t rows, lanes;
  bool dense;

  std::string described() const {
    char text[256];
    snprintf(text, sizeof text, "L=%lld out=%lld w=%lld s=%lld d=%lld left=%lld edge=%d rows=%lld lanes=%lld%s",
             (long long)w.length, (long long)w.out_length, (long long)w.window, (long long)w.stride,
             (long long)w.dilation, (long long)w.left, int(w.edge), (long long)rows, (long long)lanes,
             dense ? " dense" : "");
    return text;
  }
};

// `size`: the order of magnitude of rows and windows.
Problem random_problem(int64_t size) {
  Problem p{};
  Windows& w = p.w;
  w.length = pick<int64_t>({0, 1, 2, uniform(3, 40), uniform(size / 2, size), uniform(size / 2, size)});
  w.window = pick<int64_t>({1, 2, 3, uniform(1, 70), uniform(1, size), uniform(size / 4, size)});
  w.stride = pick<int64_t>({1, 1, 1, 2, 3, uniform(1, 12)});
  w.dilation = pick<int64_t>({1, 1, 1, 2, 3, 6});
  w.left = pick<int64_t>({0, 0, w.window / 2, w.extent() - 1, uniform(0, 60)});
  w.edge = w.length == 0 || uniform(0, 1) ? Edge::constant : Edge(uniform(1, 4));
  const int64_t natural = (w.length + 2 * w.left - w.extent()) / w.stride + 1;
  w.out_length = pick<int64_t>({std::max<int64_t>(natural, 0), std::max<int64_t>(natural, 0), uniform(0, 90)});
  p.rows = pick<int64_t>({0, 1, 1, 2, 3});
  p.lanes = size > 1000 ? 1 : pick<int64_t>({1, 1, 2, 5, 33, 70});
  p.dense = uniform(0, 1);
  return p;
}

template <class Key>
Key infinity_of() {
  return Key(sizeof(Key) == 2   ? pick<uint64_t>({0x7c00, 0x7f80})
             : sizeof(Key) == 4 ? 0x7f800000u
                                : 0x7ff0000000000000u);
}

// Noise, ramps, saw-teeth, ties, special values.
template <class Key>
void fill_row(Operand<Key>& x, int64_t row, int64_t lane, bool floating, Key infinity) {
  const int pattern = int(uniform(0, 5));
  const int64_t tooth = uniform(1, 40);
  const uint64_t top = uint64_t(1) << (8 * sizeof(Key) - 1), inf = uint64_t(infinity);
  for (int64_t i = 0; i < x.along; ++i) {
    uint64_t bits = generator();
    if (pattern == 1) bits = uint64_t(i);
    if (pattern == 2) bits = uint64_t(x.along - i);
    if (pattern == 3) bits = uint64_t(i % tooth == 0);
    if (pattern == 4) bits %= 3;
    if (pattern == 5) bits = pick<uint64_t>({0, top, top - 1, ~uint64_t(0), inf, inf | top, inf + 1, 1});
    if (floating && pattern >= 4 && i / 37 % 3 == 1) bits = ~uint64_t(0) - (bits & 1) * top;  // stretches of NaN
    x(row, i, lane) = Key(bits);
  }
}

// Value and tap (-1: none) of output i, straight from the definition.
template <class Key>
std::pair<Key, int64_t> brute_force(const Windows& w, const OrderedKey<Key>& key, bool floating, bool last, int64_t i,
                                    const std::vector<Key>& row) {
  Key best = OrderedKey<Key>::kLowest;
  int64_t tap = -1;
  for (int64_t t = 0; t < w.window; ++t) {
    const int64_t source = w.source(w.start(i) + t * w.dilation);
    if (source < 0) continue;
    const Key k = key.encode(row[size_t(source)]);
    if (floating && k == OrderedKey<Key>::kLowest) continue;
    if (tap < 0 || k > best || (last && k == best)) best = k, tap = t;
  }
  return {key.decode(best), tap};
}

void write_tap(unsigned char* at, OffsetType type, int64_t tap) {
  const int32_t narrow = int32_t(tap);
  memcpy(at, &narrow, size_t(type));
}

template <class Key>
void check_extrema(const Problem& problem) {
  const Windows& w = problem.w;
  const bool floating = sizeof(Key) > 1 && uniform(0, 1), minimum = uniform(0, 1), ignore_nan = uniform(0, 1);
  const ElementKind kind = floating        ? ElementKind::floating
                           : uniform(0, 1) ? ElementKind::signed_integer
                                           : ElementKind::unsigned_integer;
  const Key infinity = infinity_of<Key>();
  Operand<Key> x(problem.rows, w.length, problem.lanes, problem.dense);
  for (int64_t row = 0; row < problem.rows; ++row)
    for (int64_t lane = 0; lane < problem.lanes; ++lane) fill_row(x, row, lane, floating, infinity);

  Extrema<Key> p{};
  p.windows = w;
  p.outputs = int(uniform(1, 2));
  p.key[0] = OrderedKey<Key>::make(kind, infinity, p.outputs == 2 || minimum, ignore_nan);
  p.key[1] = OrderedKey<Key>::make(kind, infinity, false, ignore_nan);
  p.offset = uniform(0, 1) ? OffsetType::none : offset_type(w.window);
  p.last = uniform(0, 1);
  p.lanes = problem.lanes;
  const int64_t width = int64_t(p.offset);

  Operand<Key> blank(problem.rows, w.out_length, problem.lanes, problem.dense);
  std::vector<std::vector<Key>> want_y(2, blank.memory);
  std::vector<std::vector<unsigned char>> want_taps(
      2, std::vector<unsigned char>(blank.memory.size() * size_t(width), 0xcd));
  for (int n = 0; n < p.outputs; ++n)
    for (int64_t row = 0; row < problem.rows; ++row)
      for (int64_t lane = 0; lane < problem.lanes; ++lane) {
        std::vector<Key> values;
        for (int64_t i = 0; i < w.length; ++i) values.push_back(x(row, i, lane));
        for (int64_t i = 0; i < w.out_length; ++i) {
          const auto [y, tap] = brute_force(w, p.key[n], floating, p.last, i, values);
          want_y[size_t(n)][size_t(blank.at(row, i, lane))] = y;
          if (width) write_tap(&want_taps[size_t(n)][size_t(blank.at(row, i, lane) * width)], p.offset, tap);
        }
      }

  p.x = x.memory.data();
  p.x_stride = x.stride;
  p.y_stride = blank.stride;
  p.rows = rows_of<2>(problem.rows, {x.row_stride, blank.row_stride});
  at_every_level([&](int level, const std::string& name) {
    std::vector<std::vector<Key>> y(2, blank.memory);
    std::vector<std::vector<unsigned char>> taps(2, std::vector<unsigned char>(want_taps[0].size(), 0xcd));
    for (size_t n = 0; n < 2; ++n) p.y[n] = y[n].data(), p.offsets[n] = width ? taps[n].data() : nullptr;
    extrema_at(level, p);
    bool ok = true;
    for (size_t n = 0; n < 2; ++n) ok &= same(y[n], want_y[n]) && same(taps[n], want_taps[n]);
    report(ok, "extrema " + name + " bytes=" + std::to_string(sizeof(Key)) + (floating ? " float" : " integer") +
                   " offset=" + std::to_string(width) + " outputs=" + std::to_string(p.outputs) + " " +
                   problem.described());
  });
}

template <class T>
T from_integer(int64_t value) {
  if constexpr (std::is_floating_point_v<T>)
    return T(value);
  else
    return T::from(float(value));
}

// Gradients are small integers, whose sums are exact in any order; then winner_gather and winner_index on the same
// taps.
template <class T>
void check_winners(const Problem& problem) {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  const Windows& w = problem.w;
  const OffsetType type = offset_type(w.window);
  const int64_t width = int64_t(type);
  const OrderedKey<int32_t> key =
      OrderedKey<int32_t>::make(ElementKind::floating, 0x7f800000, uniform(0, 1), uniform(0, 1));
  const bool last = uniform(0, 1);
  Operand<T> grad_y(problem.rows, w.out_length, problem.lanes, problem.dense);
  Operand<T> grad_x(problem.rows, w.length, problem.lanes, problem.dense);
  Operand<Bits> values(problem.rows, w.length, problem.lanes, problem.dense);
  Operand<Bits> y(problem.rows, w.out_length, problem.lanes, problem.dense);
  Operand<int64_t> index(problem.rows, w.out_length, problem.lanes, problem.dense);
  Operand<char> shape(problem.rows, w.out_length, problem.lanes, problem.dense);
  std::vector<unsigned char> taps(shape.memory.size() * size_t(width), 0xff);
  auto want_grad = grad_x.memory;
  auto want_y = y.memory;
  auto want_index = index.memory;
  const auto blank_grad = grad_x.memory;
  const auto blank_y = y.memory;
  const auto blank_index = index.memory;
  for (Bits& value : values.memory) value = Bits(generator());
  for (int64_t row = 0; row < problem.rows; ++row)
    for (int64_t lane = 0; lane < problem.lanes; ++lane) {
      Operand<int32_t> x(1, w.length, 1, true);
      fill_row(x, 0, 0, true, int32_t(0x7f800000));
      std::vector<int64_t> sums(size_t(w.length), 0);
      for (int64_t i = 0; i < w.out_length; ++i) {
        const int64_t tap = brute_force(w, key, true, last, i, x.memory).second;
        const int64_t source = tap < 0 ? -1 : w.source(w.start(i) + tap * w.dilation);
        const int64_t grad = uniform(-1, 1);
        write_tap(&taps[size_t(shape.at(row, i, lane) * width)], type, tap);
        grad_y(row, i, lane) = from_integer<T>(grad);
        want_index[size_t(index.at(row, i, lane))] = source;
        want_y[size_t(y.at(row, i, lane))] = source < 0 ? Bits(0) : values(row, source, lane);
        if (source >= 0) sums[size_t(source)] += grad;
      }
      for (int64_t j = 0; j < w.length; ++j)
        want_grad[size_t(grad_x.at(row, j, lane))] = from_integer<T>(sums[size_t(j)]);
    }

  WinnerSums<T> sum{};
  sum.windows = w;
  sum.grad_y = grad_y.memory.data(), sum.offsets = taps.data(), sum.grad_x = grad_x.memory.data();
  sum.offset = type;
  sum.grad_y_stride = grad_y.stride, sum.offsets_stride = shape.stride, sum.grad_x_stride = grad_x.stride;
  sum.lanes = problem.lanes;
  sum.rows = rows_of<3>(problem.rows, {grad_y.row_stride, shape.row_stride, grad_x.row_stride});
  at_every_level([&](int level, const std::string& name) {
    winner_sums(sum, Pieces(), Chunks{level});
    report(same(grad_x.memory, want_grad),
           "sums " + name + " bytes=" + std::to_string(sizeof(T)) + " " + problem.described());
    grad_x.memory = blank_grad;
  });

  WinnerGather<Bits> gather{};
  gather.windows = w;
  gather.values = values.memory.data(), gather.offsets = taps.data(), gather.y = y.memory.data();
  gather.offset = type;
  gather.values_stride = values.stride, gather.offsets_stride = shape.stride, gather.y_stride = y.stride;
  gather.lanes = problem.lanes;
  gather.rows = rows_of<3>(problem.rows, {values.row_stride, shape.row_stride, y.row_stride});
  at_every_level([&](int level, const std::string& name) {
    winner_gather(gather, Pieces(), Chunks{level});
    report(same(y.memory, want_y),
           "gather " + name + " bytes=" + std::to_string(sizeof(T)) + " " + problem.described());
    y.memory = blank_y;
  });

  WinnerIndex where{};
  where.windows = w;
  where.offsets = taps.data(), where.index = index.memory.data();
  where.offset = type;
  where.offsets_stride = shape.stride, where.index_stride = index.stride;
  where.lanes = problem.lanes;
  where.rows = rows_of<2>(problem.rows, {shape.row_stride, index.row_stride});
  at_every_level([&](int level, const std::string& name) {
    winner_index(where, Pieces(), Chunks{level});
    report(same(index.memory, want_index), "index " + name + " " + problem.described());
    index.memory = blank_index;
  });
}

template <int kBytes>
struct Types;
template <>
struct Types<1> {
  using Key = int8_t;
  using Gradient = BFloat16;
};
template <>
struct Types<2> {
  using Key = int16_t;
  using Gradient = Float16;
};
template <>
struct Types<4> {
  using Key = int32_t;
  using Gradient = float;
};
template <>
struct Types<8> {
  using Key = int64_t;
  using Gradient = double;
};

}  // namespace

int main(int argc, char** argv) {
  using Tested = Types<PYPERF_TEST_KEY_BYTES>;
  const int rounds = argc > 1 ? atoi(argv[1]) : 300;
  for (int round = 0; round < rounds; ++round) {
    check_extrema<Tested::Key>(random_problem(400));
    check_winners<Tested::Gradient>(random_problem(400));
    if (round % 30 == 0) check_extrema<Tested::Key>(random_problem(12000));  // blocks of blocks
  }
  printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
