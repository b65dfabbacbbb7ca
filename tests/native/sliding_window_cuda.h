// Torch-free test of kernels/cuda/sliding_window.cuh: every path against brute force on small random problems. Included
// by sliding_window_cuda.cpp (emulator) and sliding_window_cuda.cu (a GPU).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#if !defined(__CUDACC__)
#include "cuda_emulator.h"
#endif
#include "../../kernels/cuda/sliding_window.cuh"

namespace test {

using namespace pyperf;
using namespace pyperf::sliding_window;

inline int passed = 0, failed = 0;
inline std::mt19937_64 generator(20240607);

inline int64_t uniform(int64_t low, int64_t high) { return low + int64_t(generator() % uint64_t(high - low + 1)); }
template <class T>
T pick(std::initializer_list<T> choices) {
  return choices.begin()[uniform(0, int64_t(choices.size()) - 1)];
}

inline void report(bool ok, const std::string& what) {
  ok ? ++passed : ++failed;
  if (!ok && failed <= 20) printf("FAILED %s\n", what.c_str());
}

inline void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  printf("%s: %s\n", what, cudaGetErrorString(error));
  exit(2);
}

// A device array between guard bytes.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count, unsigned char fill = 0xcd) : host_(size_t(count + 2 * kGuard)) {
    memset(static_cast<void*>(host_.data()), fill, bytes());
    require(cudaMalloc(reinterpret_cast<void**>(&device_), bytes()), "cudaMalloc");
    upload();
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(device_); }

  T* host() { return host_.data() + kGuard; }
  T* device() { return device_ + kGuard; }
  int64_t count() const { return int64_t(host_.size()) - 2 * kGuard; }
  void upload() { require(cudaMemcpy(device_, host_.data(), bytes(), cudaMemcpyHostToDevice), "upload"); }
  void download() { require(cudaMemcpy(host_.data(), device_, bytes(), cudaMemcpyDeviceToHost), "download"); }
  bool same_as(const Buffer& other) const { return memcmp(host_.data(), other.host_.data(), bytes()) == 0; }

 private:
  static constexpr int64_t kGuard = 64;
  size_t bytes() const { return host_.size() * sizeof(T); }
  std::vector<T> host_;
  T* device_ = nullptr;
};

// One operand: [outer, inner, along, lanes], gaps between the rows.
struct Layout {
  int64_t outer, inner, along, lanes;
  int64_t base, stride, inner_stride, outer_stride;

  static Layout random(int64_t outer, int64_t inner, int64_t along, int64_t lanes, bool dense) {
    Layout l{outer, inner, along, lanes, 0, 0, 0, 0};
    l.base = uniform(0, 2) ? uniform(0, 9) : 0;
    l.stride = dense ? lanes : lanes + pick<int64_t>({0, 1, 3});
    l.inner_stride = along * l.stride + pick<int64_t>({0, 0, 1, 7});
    l.outer_stride = inner * l.inner_stride + pick<int64_t>({0, 0, 5});
    return l;
  }
  int64_t size() const { return base + outer * outer_stride + 1; }
  int64_t row(int64_t o, int64_t i) const { return base + o * outer_stride + i * inner_stride; }
  int64_t at(int64_t o, int64_t i, int64_t k, int64_t lane) const { return row(o, i) + k * stride + lane; }
};

template <int N>
StridedRows<N> rows_of(const Layout* const (&layouts)[N]) {
  StridedRows<N> rows{};
  rows.count = layouts[0]->outer * layouts[0]->inner;
  rows.dims = 2;
  rows.size[0] = layouts[0]->outer;
  rows.size[1] = layouts[0]->inner;
  for (int n = 0; n < N; ++n) {
    rows.stride[n][0] = layouts[n]->outer_stride;
    rows.stride[n][1] = layouts[n]->inner_stride;
  }
  return rows;
}

template <class Visit>
void for_each_lane(const Layout& layout, Visit visit) {
  for (int64_t o = 0; o < layout.outer; ++o)
    for (int64_t i = 0; i < layout.inner; ++i)
      for (int64_t lane = 0; lane < layout.lanes; ++lane) visit(o, i, lane);
}

template <class Key>
struct Kind {
  ElementKind kind;
  Key infinity;
};

template <class Key>
Kind<Key> random_kind() {
  const Kind<Key> integer{uniform(0, 1) ? ElementKind::signed_integer : ElementKind::unsigned_integer, Key(0)};
  if (sizeof(Key) == 1 || uniform(0, 2) == 0) return integer;
  const uint64_t infinity = sizeof(Key) == 2   ? pick<uint64_t>({0x7c00, 0x7f80})
                            : sizeof(Key) == 4 ? 0x7f800000u
                                               : 0x7ff0000000000000u;
  return {ElementKind::floating, Key(infinity)};
}

// Fills one row: ties, ramps, special values, stretches of NaN.
template <class Key>
std::vector<Key> random_row(const Kind<Key>& kind, int64_t length) {
  const int pattern = int(uniform(0, 5));
  const int64_t tooth = uniform(1, 40);
  const uint64_t lowest = uint64_t(1) << (8 * sizeof(Key) - 1);
  std::vector<Key> row(size_t(length), Key(0));
  for (int64_t i = 0; i < length; ++i) {
    uint64_t bits = generator();
    if (pattern == 1) bits = uint64_t(i);
    if (pattern == 2) bits = uint64_t(length - i);
    if (pattern == 3) bits = uint64_t(i % tooth == 0);
    if (pattern == 4) bits = bits % 3;
    if (pattern == 5)
      bits = pick<uint64_t>({0, lowest, lowest - 1, ~uint64_t(0), uint64_t(kind.infinity),
                             uint64_t(kind.infinity) | lowest, uint64_t(kind.infinity) + 1, 1});
    if (kind.kind == ElementKind::floating && pattern >= 4 && i / 37 % 3 == 1)
      bits = ~uint64_t(0) - (bits & 1) * lowest;
    row[size_t(i)] = Key(bits);
  }
  return row;
}

struct Geometry {
  Windows windows;
  int64_t outer, inner, lanes;
  bool dense;
};

inline std::string describe(const Geometry& g) {
  const Windows& w = g.windows;
  char text[256];
  snprintf(text, sizeof text, "L=%lld out=%lld w=%lld s=%lld d=%lld left=%lld edge=%d rows=%lldx%lld lanes=%lld%s",
           (long long)w.length, (long long)w.out_length, (long long)w.window, (long long)w.stride,
           (long long)w.dilation, (long long)w.left, int(w.edge), (long long)g.outer, (long long)g.inner,
           (long long)g.lanes, g.dense ? " dense" : "");
  return text;
}

inline Geometry random_geometry() {
  Geometry g{};
  Windows& w = g.windows;
  w.length = pick<int64_t>({0, 1, 2, uniform(3, 40), uniform(40, 700)});
  w.window = pick<int64_t>({1, 2, 3, uniform(1, 20), uniform(1, 400)});
  w.stride = pick<int64_t>({1, 1, 1, 2, 3, uniform(1, 12)});
  w.dilation = pick<int64_t>({1, 1, 1, 2, 3, 4, 6});
  w.left = pick<int64_t>({0, 0, w.window / 2, w.extent() - 1, -3, uniform(0, 60)});
  w.edge = uniform(0, 1) ? Edge::constant : Edge(uniform(1, 4));
  const int64_t natural = (w.length + 2 * std::max<int64_t>(w.left, 0) - w.extent()) / w.stride + 1;
  w.out_length = pick<int64_t>({std::max<int64_t>(natural, 0), std::max<int64_t>(natural, 0), uniform(0, 90)});
  g.outer = pick<int64_t>({1, 1, 2, 3, 0});
  g.inner = pick<int64_t>({1, 2, 3});
  g.lanes = pick<int64_t>({1, 1, 2, 5, 33});
  g.dense = uniform(0, 1);
  return g;
}

template <class Key>
struct Expected {
  std::vector<Key> y;
  std::vector<int64_t> taps;
};

template <class Key>
Expected<Key> brute_force(const Windows& w, const OrderedKey<Key>& key, bool floating, bool last, const Key* x,
                          int64_t x_stride) {
  const int64_t padded = w.padded_length();
  std::vector<Key> keys(static_cast<size_t>(padded));
  std::vector<char> holds(static_cast<size_t>(padded));
  for (int64_t k = 0; k < padded; ++k) {
    const int64_t source = w.source(k - w.left);
    keys[size_t(k)] = source < 0 ? OrderedKey<Key>::kLowest : key.encode(x[source * x_stride]);
    holds[size_t(k)] = source >= 0 && !(floating && keys[size_t(k)] == OrderedKey<Key>::kLowest);
  }
  Expected<Key> expected;
  for (int64_t i = 0; i < w.out_length; ++i) {
    const Key* window = keys.data() + i * w.stride;
    const char* held = holds.data() + i * w.stride;
    Key best = OrderedKey<Key>::kLowest;
    for (int64_t t = 0; t < w.window; ++t) best = std::max(best, window[t * w.dilation]);
    const int64_t step = last ? -1 : 1;
    int64_t tap = last ? w.window - 1 : 0;
    while (tap >= 0 && tap < w.window && !(held[tap * w.dilation] && window[tap * w.dilation] == best)) tap += step;
    expected.y.push_back(key.decode(best));
    expected.taps.push_back(tap < w.window ? tap : -1);
  }
  return expected;
}

inline int64_t tap_bytes(OffsetType type) { return int64_t(type); }

inline void write_tap(unsigned char* offsets, OffsetType type, int64_t index, int64_t tap) {
  const int32_t narrow = int32_t(tap);  // little endian: the low bytes come first
  memcpy(offsets + index * tap_bytes(type), &narrow, size_t(tap_bytes(type)));
}

enum class Path { chosen, segments, tiles, huge };

template <class Key>
bool run_path(const Extrema<Key>& p, Path path) {
  if (path == Path::tiles && !tiles_fit(p)) return false;
  if (path == Path::huge && !huge_fits(p)) return false;
  const int64_t bytes = path == Path::chosen ? extrema_workspace_bytes(p)
                        : path == Path::huge ? huge_workspace_bytes(p)
                                             : 0;
  Buffer<unsigned char> workspace(bytes, 0xee);
  const cudaError_t error = path == Path::chosen     ? extrema(p, workspace.device(), cudaStream_t{})
                            : path == Path::segments ? extrema_by_segments(p, cudaStream_t{})
                            : path == Path::tiles    ? extrema_by_tiles(p, cudaStream_t{})
                                                     : extrema_by_huge(p, workspace.device(), cudaStream_t{});
  require(error, "extrema");
  require(cudaDeviceSynchronize(), "extrema");
  Buffer<unsigned char> untouched(bytes, 0xee);
  workspace.download();
  report(memcmp(workspace.host() + bytes, untouched.host() + bytes, 64) == 0 &&
             memcmp(workspace.host() - 64, untouched.host() - 64, 64) == 0,
         "workspace guards");
  return true;
}

template <class Key>
void check_extrema(const Geometry& g, std::initializer_list<Path> paths) {
  const Windows& w = g.windows;
  const Kind<Key> kind = random_kind<Key>();
  const bool floating = kind.kind == ElementKind::floating;
  const Layout x_layout = Layout::random(g.outer, g.inner, w.length, g.lanes, g.dense);
  const Layout y_layout = Layout::random(g.outer, g.inner, w.out_length, g.lanes, g.dense);
  Extrema<Key> p{};
  p.windows = uniform(0, 1) ? w : without_idle_taps(w, p.first_tap);
  p.outputs = int(uniform(1, 2));
  const bool minimum = uniform(0, 1), ignore_nan = uniform(0, 1);
  p.key[0] = OrderedKey<Key>::make(kind.kind, kind.infinity, p.outputs == 2 || minimum, ignore_nan);
  p.key[1] = OrderedKey<Key>::make(kind.kind, kind.infinity, false, ignore_nan);
  const OffsetType narrowest = offset_type(w.window);
  p.offset = uniform(0, 1) ? OffsetType::none : uniform(0, 2) ? narrowest : OffsetType::i32;
  p.last = uniform(0, 1);
  p.x_stride = x_layout.stride;
  p.y_stride = y_layout.stride;
  p.lanes = g.lanes;
  p.rows = rows_of<2>({&x_layout, &y_layout});

  Buffer<Key> x(x_layout.size());
  for_each_lane(x_layout, [&](int64_t o, int64_t i, int64_t lane) {
    const std::vector<Key> row = random_row(kind, w.length);
    for (int64_t k = 0; k < w.length; ++k) x.host()[x_layout.at(o, i, k, lane)] = row[size_t(k)];
  });
  x.upload();
  p.x = x.device() + x_layout.base;
  p.rows.count = g.outer * g.inner;

  const int64_t width = std::max<int64_t>(tap_bytes(p.offset), 1);
  Buffer<Key> want_y[2] = {Buffer<Key>(y_layout.size()), Buffer<Key>(y_layout.size())};
  Buffer<unsigned char> want_taps[2] = {Buffer<unsigned char>(y_layout.size() * width),
                                        Buffer<unsigned char>(y_layout.size() * width)};
  for (int n = 0; n < p.outputs; ++n) {
    for_each_lane(y_layout, [&](int64_t o, int64_t i, int64_t lane) {
      const Expected<Key> expected =
          brute_force(w, p.key[n], floating, p.last, x.host() + x_layout.row(o, i) + lane, x_layout.stride);
      for (int64_t k = 0; k < w.out_length; ++k) {
        const int64_t index = y_layout.at(o, i, k, lane);
        want_y[n].host()[index] = expected.y[size_t(k)];
        if (p.offset != OffsetType::none) write_tap(want_taps[n].host(), p.offset, index, expected.taps[size_t(k)]);
      }
    });
  }

  for (const Path path : paths) {
    Buffer<Key> y[2] = {Buffer<Key>(y_layout.size()), Buffer<Key>(y_layout.size())};
    Buffer<unsigned char> taps[2] = {Buffer<unsigned char>(y_layout.size() * width),
                                     Buffer<unsigned char>(y_layout.size() * width)};
    for (int n = 0; n < 2; ++n) {
      p.y[n] = y[n].device() + y_layout.base;
      p.offsets[n] = p.offset == OffsetType::none ? nullptr : taps[n].device() + y_layout.base * width;
    }
    if (!run_path(p, path)) continue;
    bool values_ok = true, taps_ok = true;
    for (int n = 0; n < 2; ++n) {
      y[n].download();
      taps[n].download();
      values_ok &= y[n].same_as(want_y[n]);
      taps_ok &= taps[n].same_as(want_taps[n]);
    }
    report(values_ok && taps_ok, "extrema path " + std::to_string(int(path)) + " key" +
                                     std::to_string(8 * sizeof(Key)) + (floating ? " float" : " int") +
                                     (minimum ? " min" : " max") + (ignore_nan ? " ignore" : " propagate") +
                                     " outputs=" + std::to_string(p.outputs) +
                                     " offset=" + std::to_string(int(p.offset)) + (p.last ? " last " : " first ") +
                                     (values_ok ? "" : "[values] ") + (taps_ok ? "" : "[taps] ") + describe(g));
  }
}

// Winner taps as a forward pass would save them, some of them dropped as `min_count` drops them.
inline void random_winners(const Geometry& g, const Layout& layout, OffsetType type, unsigned char* offsets,
                           std::vector<int64_t>& taps) {
  const Windows& w = g.windows;
  const Kind<int32_t> kind{ElementKind::floating, 0x7f800000};
  const bool last = uniform(0, 1), ignore_nan = uniform(0, 1), drop = uniform(0, 2) == 0;
  const OrderedKey<int32_t> key = OrderedKey<int32_t>::make(kind.kind, kind.infinity, uniform(0, 1), ignore_nan);
  for_each_lane(layout, [&](int64_t o, int64_t i, int64_t lane) {
    const std::vector<int32_t> row = random_row(kind, w.length);
    const Expected<int32_t> expected = brute_force(w, key, true, last, row.data(), 1);
    for (int64_t k = 0; k < w.out_length; ++k) {
      const int64_t tap = drop && uniform(0, 3) == 0 ? -1 : expected.taps[size_t(k)];
      write_tap(offsets, type, layout.at(o, i, k, lane), tap);
      taps.push_back(tap);
    }
  });
}

// Offsets that no forward makes: whatever comes out, nothing outside the outputs is written.
template <class T>
void check_nonsense_offsets(const Geometry& g) {
  const Windows& w = g.windows;
  const OffsetType type = offset_type(w.window);
  const Layout out = Layout::random(g.outer, g.inner, w.out_length, g.lanes, g.dense);
  const Layout in = Layout::random(g.outer, g.inner, w.length, g.lanes, g.dense);
  Buffer<T> grad_y(out.size()), grad_x(in.size()), untouched(in.size());
  Buffer<unsigned char> offsets(out.size() * tap_bytes(type));
  for (int64_t k = 0; k < offsets.count(); ++k) offsets.host()[k] = (unsigned char)(generator());
  offsets.upload();
  WinnerSums<T> p{};
  p.windows = w;
  p.grad_y = grad_y.device() + out.base;
  p.offsets = offsets.device() + out.base * tap_bytes(type);
  p.grad_x = grad_x.device() + in.base;
  p.offset = type;
  p.grad_y_stride = p.offsets_stride = out.stride, p.grad_x_stride = in.stride;
  p.lanes = g.lanes;
  p.rows = rows_of<3>({&out, &out, &in});
  Buffer<double> workspace((winner_sums_workspace_bytes(p) + 7) / 8);
  require(winner_sums(p, workspace.device(), cudaStream_t{}), "winner_sums");
  require(cudaDeviceSynchronize(), "winner_sums");
  grad_x.download();
  for_each_lane(in, [&](int64_t o, int64_t i, int64_t lane) {
    for (int64_t j = 0; j < w.length; ++j) grad_x.host()[in.at(o, i, j, lane)] = untouched.host()[0];
  });
  report(grad_x.same_as(untouched), "nonsense offsets " + describe(g));
}

// The documented order of summation, straight from its definition.
template <class T>
void brute_force_sums(const Windows& w, const int64_t* taps, const std::vector<T>& grad_y, std::vector<T>& grad_x) {
  using Sum = typename Accumulate<T>::type;
  const Phases phases(w);
  const int64_t padded_length = w.padded_length();
  struct Piece {
    Sum sum = 0;
    bool some = false;
    void add(Sum value) { sum = some ? sum + value : value, some = true; }
  };
  std::vector<Sum> padded(size_t(padded_length), Sum(0));
  for (int64_t phase = 0; phase < phases.count; ++phase) {
    const int64_t outputs = phases.outputs(w, phase);
    for (int64_t c = 0; c < outputs;) {
      auto winner_of = [&](int64_t at) {
        const int64_t i = phase + at * phases.count;
        return taps[i] < 0 ? INT64_MIN : w.start(i) + taps[i] * w.dilation;
      };
      const int64_t winner = winner_of(c);
      if (winner == INT64_MIN) {
        ++c;
        continue;
      }
      Piece run;
      while (c < outputs && (winner_of(c) == winner || winner_of(c) == INT64_MIN)) {
        Piece chunk;
        const int64_t chunk_end = std::min(outputs, (c / kChunk + 1) * kChunk);
        bool open = true;
        while (open && c < chunk_end) {
          Piece leaf;
          const int64_t leaf_end = std::min(chunk_end, (c / kLeaf + 1) * kLeaf);
          for (; c < leaf_end; ++c) {
            const int64_t found = winner_of(c);
            if (found == INT64_MIN) continue;
            if (found != winner) {
              open = false;
              break;
            }
            leaf.add(Sum(grad_y[size_t(phase + c * phases.count)]));
          }
          if (leaf.some) chunk.add(leaf.sum);
        }
        if (chunk.some) run.add(chunk.sum);
        if (!open) break;
      }
      padded[size_t(winner + w.left)] = run.sum;
    }
  }
  for (int64_t j = 0; j < w.length; ++j) {
    const int64_t own = j + w.left;
    Sum sum = own >= 0 && own < padded_length ? padded[size_t(own)] : Sum(0);
    if (w.edge != Edge::constant)
      for (int64_t k = 0; k < padded_length; ++k)
        if (k != own && w.source(k - w.left) == j) sum += padded[size_t(k)];
    grad_x[size_t(j)] = Accumulate<T>::store(sum);
  }
}

template <class T>
T random_gradient() {
  const double value = double(uniform(-4000, 4000)) * 0.37 + (uniform(0, 1) ? 1e-3 : 0.);
  if constexpr (std::is_same_v<T, double> || std::is_same_v<T, float>)
    return T(value);
  else
    return T::from(float(value));
}

enum class SumsPath { chosen, chunks, tiles };

template <class T>
void check_sums(const Geometry& g, std::initializer_list<SumsPath> paths) {
  const Windows& w = g.windows;
  const OffsetType type = uniform(0, 3) ? offset_type(w.window) : OffsetType::i32;
  const Layout gy = Layout::random(g.outer, g.inner, w.out_length, g.lanes, g.dense);
  const Layout off = Layout::random(g.outer, g.inner, w.out_length, g.lanes, g.dense);
  const Layout gx = Layout::random(g.outer, g.inner, w.length, g.lanes, g.dense);
  const int64_t width = tap_bytes(type);
  Buffer<T> grad_y(gy.size()), want(gx.size());
  Buffer<unsigned char> offsets(off.size() * width);
  std::vector<int64_t> taps;
  random_winners(g, off, type, offsets.host(), taps);
  const int64_t* row_taps = taps.data();
  for_each_lane(gy, [&](int64_t o, int64_t i, int64_t lane) {
    std::vector<T> gradients(static_cast<size_t>(w.out_length)), sums(static_cast<size_t>(w.length));
    for (int64_t k = 0; k < w.out_length; ++k)
      grad_y.host()[gy.at(o, i, k, lane)] = gradients[size_t(k)] = random_gradient<T>();
    brute_force_sums(w, row_taps, gradients, sums);
    for (int64_t j = 0; j < w.length; ++j) want.host()[gx.at(o, i, j, lane)] = sums[size_t(j)];
    row_taps += w.out_length;
  });
  grad_y.upload();
  offsets.upload();

  WinnerSums<T> p{};
  p.windows = w;
  p.grad_y = grad_y.device() + gy.base;
  p.offsets = offsets.device() + off.base * width;
  p.offset = type;
  p.grad_y_stride = gy.stride, p.offsets_stride = off.stride, p.grad_x_stride = gx.stride;
  p.lanes = g.lanes;
  p.rows = rows_of<3>({&gy, &off, &gx});
  for (const SumsPath path : paths) {
    if (path == SumsPath::tiles && !sums_tiles_fit(p)) continue;
    Buffer<T> grad_x(gx.size());
    p.grad_x = grad_x.device() + gx.base;
    const int64_t bytes = path == SumsPath::chunks   ? chunked_sums_workspace_bytes(p)
                          : path == SumsPath::chosen ? winner_sums_workspace_bytes(p)
                                                     : 0;
    Buffer<double> workspace((bytes + 7) / 8, 0xee);
    const cudaError_t error = path == SumsPath::chunks  ? winner_sums_by_chunks(p, workspace.device(), cudaStream_t{})
                              : path == SumsPath::tiles ? winner_sums_by_tiles(p, cudaStream_t{})
                                                        : winner_sums(p, workspace.device(), cudaStream_t{});
    require(error, "winner_sums");
    require(cudaDeviceSynchronize(), "winner_sums");
    grad_x.download();
    report(grad_x.same_as(want), "sums path " + std::to_string(int(path)) + " bytes=" + std::to_string(sizeof(T)) +
                                     " offset=" + std::to_string(int(type)) + " " + describe(g));
  }
}

template <class Bits>
void check_gather(const Geometry& g) {
  const Windows& w = g.windows;
  const OffsetType type = uniform(0, 3) ? offset_type(w.window) : OffsetType::i32;
  const int64_t width = tap_bytes(type);
  const Layout in = Layout::random(g.outer, g.inner, w.length, g.lanes, g.dense);
  const Layout off = Layout::random(g.outer, g.inner, w.out_length, g.lanes, g.dense);
  const Layout out = Layout::random(g.outer, g.inner, w.out_length, g.lanes, g.dense);
  Buffer<Bits> values(in.size()), y(out.size()), want_y(out.size());
  Buffer<int64_t> index(out.size()), want_index(out.size());
  Buffer<unsigned char> offsets(off.size() * width);
  std::vector<int64_t> taps;
  random_winners(g, off, type, offsets.host(), taps);
  for (int64_t k = 0; k < in.size(); ++k) values.host()[k] = Bits(generator());
  const int64_t* row_taps = taps.data();
  for_each_lane(out, [&](int64_t o, int64_t i, int64_t lane) {
    for (int64_t k = 0; k < w.out_length; ++k) {
      const int64_t source = row_taps[k] < 0 ? -1 : w.source(w.start(k) + row_taps[k] * w.dilation);
      want_index.host()[out.at(o, i, k, lane)] = source;
      want_y.host()[out.at(o, i, k, lane)] = source < 0 ? Bits(0) : values.host()[in.at(o, i, source, lane)];
    }
    row_taps += w.out_length;
  });
  values.upload();
  offsets.upload();

  WinnerGather<Bits> gather{};
  gather.windows = w;
  gather.values = values.device() + in.base;
  gather.offsets = offsets.device() + off.base * width;
  gather.y = y.device() + out.base;
  gather.offset = type;
  gather.values_stride = in.stride, gather.offsets_stride = off.stride, gather.y_stride = out.stride;
  gather.lanes = g.lanes;
  gather.rows = rows_of<3>({&in, &off, &out});
  require(winner_gather(gather, cudaStream_t{}), "winner_gather");
  WinnerIndex where{};
  where.windows = w;
  where.offsets = gather.offsets;
  where.index = index.device() + out.base;
  where.offset = type;
  where.offsets_stride = off.stride, where.index_stride = out.stride;
  where.lanes = g.lanes;
  where.rows = rows_of<2>({&off, &out});
  require(winner_index(where, cudaStream_t{}), "winner_index");
  require(cudaDeviceSynchronize(), "winner_gather");
  y.download();
  index.download();
  report(y.same_as(want_y), "gather bytes=" + std::to_string(sizeof(Bits)) + " " + describe(g));
  report(index.same_as(want_index), "index " + describe(g));
}

inline void check_extrema_of_width(int width, const Geometry& g, std::initializer_list<Path> paths) {
  if (width == 0) check_extrema<int8_t>(g, paths);
  if (width == 1) check_extrema<int16_t>(g, paths);
  if (width == 2) check_extrema<int32_t>(g, paths);
  if (width == 3) check_extrema<int64_t>(g, paths);
}

inline void check_sums_of_type(int type, const Geometry& g, std::initializer_list<SumsPath> paths) {
  if (type == 0) check_sums<Float16>(g, paths);
  if (type == 1) check_sums<BFloat16>(g, paths);
  if (type == 2) check_sums<float>(g, paths);
  if (type == 3) check_sums<double>(g, paths);
}

// Layouts of every kind, short rows.
inline void check_small(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const Geometry g = random_geometry();
    check_extrema_of_width(round % 4, g, {Path::chosen, Path::segments, Path::tiles, Path::huge});
    check_sums_of_type(round / 4 % 4, random_geometry(), {SumsPath::chosen, SumsPath::chunks, SumsPath::tiles});
    check_nonsense_offsets<float>(random_geometry());
    const Geometry h = random_geometry();
    if (round % 3 == 0) check_gather<uint16_t>(h);
    if (round % 3 == 1) check_gather<uint32_t>(h);
    if (round % 3 == 2) check_gather<uint64_t>(h);
  }
}

// Dense rows long enough for several tiles.
inline Geometry long_rows(int64_t length, int64_t window) {
  Geometry g{};
  Windows& w = g.windows;
  w.length = length;
  w.window = window;
  w.stride = pick<int64_t>({1, 1, 1, 2, 3, 5});
  w.dilation = 1;
  w.left = pick<int64_t>({0, 0, window / 2, window - 1, uniform(0, 3 * window / 2), -2});
  w.edge = uniform(0, 1) ? Edge::constant : Edge(uniform(1, 4));
  w.out_length = std::max<int64_t>((length + pick<int64_t>({w.left, 2 * w.left}) - window) / w.stride + 1, 3);
  g.outer = 1;
  g.inner = pick<int64_t>({1, 1, 2});
  g.lanes = 1;
  g.dense = true;
  return g;
}

inline void check_long(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const int64_t window =
        pick<int64_t>({2, 3, 16, 17, 18, 19, 33, 34, 35, 36, uniform(2, 70), uniform(60, 700), uniform(700, 6000)});
    const int64_t length = pick<int64_t>({uniform(500, 2000), uniform(2000, 9000), uniform(9000, 14000)});
    check_extrema_of_width(round % 4, long_rows(length, window), {Path::chosen, Path::tiles, Path::huge});
    check_sums_of_type(round / 4 % 4, long_rows(length, window), {SumsPath::chosen, SumsPath::chunks, SumsPath::tiles});
  }
}

// Windows of several tiles, up to more than two groups of them.
inline void check_huge(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const bool grouped = round % 8 == 0;
    const int64_t window = grouped ? uniform(140000, 150000) : uniform(600, 16000);
    Geometry g = long_rows(uniform(1000, 20000), window);
    g.windows.out_length = uniform(1, grouped ? 1200 : 6000);
    check_extrema_of_width(round / 2 % 4, g, {Path::chosen, Path::huge});
    g.windows.window = uniform(4000, 12000);
    g.windows.out_length = uniform(1, 9000);
    check_sums_of_type(round % 4, g, {SumsPath::chosen, SumsPath::chunks});
  }
}

inline int summary() {
  printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}

}  // namespace test
