// Torch-free test of kernels/cuda/coupling_spline.cuh: random problems of every layout, every path of the kernels, bit
// by bit against the same formulas on the host. Included by coupling_cuda.cpp (emulator) and coupling_cuda.cu (a GPU).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if !defined(__CUDACC__)
#include "cuda_emulator.h"
#endif
#include "../../kernels/cuda/coupling_spline.cuh"
#if !defined(__CUDACC__)
#include "../../kernels/common/sample_units.h"
namespace pyperf::baseline {
#define PYPERF_VECTOR_BYTES 16
#include "../../kernels/cpu/coupling_spline.h"
#undef PYPERF_VECTOR_BYTES
}  // namespace pyperf::baseline
#endif

namespace test {

using namespace pyperf;
using namespace pyperf::coupling;

inline int passed = 0, failed = 0;
inline std::mt19937_64 generator(20250711);

inline int64_t uniform(int64_t low, int64_t high) { return low + int64_t(generator() % uint64_t(high - low + 1)); }
inline double real(double low, double high) { return std::uniform_real_distribution<double>(low, high)(generator); }
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

template <class S>
double load(const unsigned char* p) {
  S s;
  memcpy(&s, p, sizeof s);
  return loaded<double>(s);
}
inline double load(const unsigned char* p, Storage type) {
  switch (type) {
    case Storage::f16: return load<Float16>(p);
    case Storage::bf16: return load<BFloat16>(p);
    case Storage::f32: return load<float>(p);
    default: return load<double>(p);
  }
}
template <class S>
void store(unsigned char* p, double value) {
  const S s = stored<S>(value);
  memcpy(p, &s, sizeof s);
}
inline void store(unsigned char* p, Storage type, double value) {
  switch (type) {
    case Storage::f16: return store<Float16>(p, value);
    case Storage::bf16: return store<BFloat16>(p, value);
    case Storage::f32: return store<float>(p, value);
    default: store<double>(p, value);
  }
}

// An array of one dtype between guard bytes, on the device and twice on the host: what a kernel makes of it, and what
// it should.
struct Array {
  static constexpr int64_t kGuard = 256;  // bytes
  Storage type;
  std::vector<unsigned char> got, want;
  unsigned char* device = nullptr;

  Array(Storage type, int64_t count)
      : type(type), got(size_t(count * storage_bytes(type) + 2 * kGuard), 0xcd), want(got) {
    require(cudaMalloc(reinterpret_cast<void**>(&device), got.size()), "cudaMalloc");
  }
  Array(const Array&) = delete;
  ~Array() { cudaFree(device); }

  int64_t count() const { return (int64_t(got.size()) - 2 * kGuard) / storage_bytes(type); }
  unsigned char* at(unsigned char* start, int64_t i) const { return start + kGuard + i * storage_bytes(type); }
  void fill(double (*value)()) {
    for (int64_t i = 0; i < count(); ++i) store(at(got.data(), i), type, value());
    want = got;
  }
  void upload() { require(cudaMemcpy(device, got.data(), got.size(), cudaMemcpyHostToDevice), "upload"); }
  void download() { require(cudaMemcpy(got.data(), device, got.size(), cudaMemcpyDeviceToHost), "download"); }

  // The same bits in and around it; a NaN is like any other.
  bool right() const {
    for (size_t byte = 0; byte < got.size(); byte += size_t(storage_bytes(type))) {
      if (memcmp(&got[byte], &want[byte], size_t(storage_bytes(type))) == 0) continue;
      const double a = load(&got[byte], type), b = load(&want[byte], type);
      if (!(std::isnan(a) && std::isnan(b))) return false;
    }
    return true;
  }
};

enum class Form { dense, gaps, planes, odd, shared };  // of parameters; dense and gaps of anything else

inline double anything() {
  switch (uniform(0, 60)) {
    case 0: return NAN;
    case 1: return INFINITY;
    case 2: return -INFINITY;
    case 3: return 1e30;
    case 4: return -1e4;
    case 5: return 3;
    case 6: return -3;
    case 7: return -0.0;
    default: return real(-4, 4);
  }
}
inline double scale_of_parameters = 1;
inline bool special_parameters = false;
inline double parameter() {
  if (special_parameters && uniform(0, 200) == 0) return anything();
  return scale_of_parameters * (real(-1, 1) + real(-1, 1) + real(-1, 1));
}

// Most of them bound something; negative ones are circular where tails are mixed.
inline double bound() {
  const double size =
      uniform(0, 30) ? pick({0.5, 1.0, 3.0, 3.0}) : pick({0.0, -0.0, 1e-40, 1e38, double(INFINITY), double(NAN)});
  return uniform(0, 2) ? size : -size;
}

struct Problem {
  int64_t sizes[3];  // of x; the last `3 - sample_dims` are summed over
  int sample_dims;   // -1: log-dets of elements
  int bins;
  Storage type, parameter_type;
  Form form, gradient_form;
  bool scalars_dense, packed, merged, masked, others;
  int shared_behind;  // -1, or the dimensions behind that many share parameters, whose gradients are summed
};

inline std::string describe(const Problem& p, const char* what) {
  const char* types[] = {"f16", "bf16", "f32", "f64"};
  const auto n = [](auto v) { return std::to_string(int64_t(v)); };
  return std::string(what) + " [" + n(p.sizes[0]) + "," + n(p.sizes[1]) + "," + n(p.sizes[2]) + "] sample_dims " +
         n(p.sample_dims) + " bins " + n(p.bins) + " " + types[int(p.type)] + "/" + types[int(p.parameter_type)] +
         " forms " + n(p.form) + n(p.gradient_form) + " dense " + n(p.scalars_dense) + " packed " + n(p.packed) +
         " merged " + n(p.merged) + " masked " + n(p.masked) + " others " + n(p.others) + " shared behind " +
         n(p.shared_behind);
}

// Channels that pass, of two tensors with dimensions in any order in memory.
struct Others {
  static constexpr int kDims = 4;
  int64_t sizes[kDims], strides[2][kDims], first[2];  // of the source and of the result
  int channel;
  Progression transformed;
  Array* arrays[2];

  template <class Visit>
  void each(const Visit& visit) const {
    int64_t at[kDims];
    for (at[0] = 0; at[0] < sizes[0]; ++at[0])
      for (at[1] = 0; at[1] < sizes[1]; ++at[1])
        for (at[2] = 0; at[2] < sizes[2]; ++at[2])
          for (at[3] = 0; at[3] < sizes[3]; ++at[3]) {
            const int64_t behind = at[channel] - transformed.first;
            if (behind >= 0 && behind % transformed.step == 0 && behind / transformed.step < transformed.count)
              continue;
            int64_t offset[2] = {first[0], first[1]};
            for (int d = 0; d < kDims; ++d)
              for (int k = 0; k < 2; ++k) offset[k] += at[d] * strides[k][d];
            visit(offset[0], offset[1]);
          }
  }
};

// Operands of one call, on the device or on the host.
struct Call {
  SplineElements e{};
  std::vector<std::unique_ptr<Array>> arrays;
  struct Where {
    Array* array;
    int64_t first;
  };
  Where where[kSplineOperands] = {};
  Array *sample_logdet = nullptr, *bounds = nullptr, *mask = nullptr, *shared = nullptr, *to_others = nullptr;
  Others others{};

  int64_t rows_stride[kSplineOperands][3] = {};

  Array* add(Storage type, int64_t count) {
    arrays.emplace_back(new Array(type, count));
    return arrays.back().get();
  }
  void place(int operand, Array* array, int64_t first, const int64_t (&stride)[3], int64_t parameter_stride = 0) {
    where[operand] = {array, first};
    for (int d = 0; d < 3; ++d) rows_stride[operand][d] = stride[d];
    e.parameter_stride[operand] = parameter_stride;
  }
  void add_scalars(const Problem& p, int operand, Storage type) {
    const int64_t* n = p.sizes;
    const int64_t gap = p.scalars_dense ? 0 : pick<int64_t>({0, 1, 5}), first = p.scalars_dense ? 0 : uniform(0, 3);
    int64_t stride[3] = {n[1] * (n[2] + gap), n[2] + gap, 1};
    if (!p.scalars_dense && uniform(0, 3) == 0) stride[0] = 1, stride[1] = n[0], stride[2] = n[0] * n[1];
    place(operand, add(type, first + n[0] * n[1] * (n[2] + gap)), first, stride);
  }
  void add_others(Storage type) {
    Others& o = others;
    for (int64_t& n : o.sizes) n = pick<int64_t>({1, 2, 3, 4, 8});
    o.channel = int(uniform(0, Others::kDims - 1));
    const int64_t channels = o.sizes[o.channel];
    o.transformed.count = uniform(1, channels);
    o.transformed.step =
        o.transformed.count > 1 ? uniform(1, (channels - 1) / (o.transformed.count - 1)) : uniform(1, 3);
    o.transformed.first = uniform(0, channels - 1 - (o.transformed.count - 1) * o.transformed.step);
    for (int k = 0; k < 2; ++k) {
      int order[Others::kDims] = {0, 1, 2, 3};
      if (uniform(0, 1)) std::shuffle(order, order + Others::kDims, generator);
      int64_t apart = uniform(0, 3) ? 1 : 2;
      for (int i = Others::kDims - 1; i >= 0; --i) {
        o.strides[k][order[i]] = apart;
        apart *= o.sizes[order[i]];
        if (uniform(0, 3) == 0) apart += pick<int64_t>({1, 8});
      }
      o.first[k] = uniform(0, 1) ? 0 : uniform(0, 9);
      o.arrays[k] = add(type, o.first[k] + apart);
    }
    to_others = o.arrays[1];
  }
  // Shared along some dimensions, or along none. Flags are bytes.
  Array* add_aside(const Problem& p, Storage type, int64_t bytes, Aside& aside) {
    const int64_t* n = p.sizes;
    const int shared = int(uniform(0, 3));
    const int64_t step = pick<int64_t>({1, 2});
    const int64_t stride[3] = {shared ? 0 : n[1] * n[2] * step, shared > 1 ? 0 : n[2] * step, shared > 2 ? 0 : step};
    const bool merges = shared == 3 || (shared == 0 && uniform(0, 1));
    aside.rows.dims = merges ? 0 : 2;
    aside.rows.count = merges ? 1 : n[0] * n[1];
    for (int d = 0; d < aside.rows.dims; ++d) aside.rows.size[d] = n[d], aside.rows.stride[0][d] = stride[d];
    aside.n = merges ? n[0] * n[1] * n[2] : n[2];
    aside.stride = stride[2];
    return add(type, n[0] * n[1] * n[2] * step * bytes / storage_bytes(type) + 1);
  }
  // Three tensors of `counts` parameters, or one that holds them side by side.
  void add_parameters(const Problem& p, int operand, Form form, bool packed, const int64_t (&counts)[3]) {
    const int64_t* n = p.sizes;
    const int64_t elements = n[0] * n[1] * n[2], all = counts[0] + counts[1] + counts[2];
    Array* array = nullptr;
    int64_t before = 0, first = 0, stride[3], step = 1;
    for (int k = 0; k < 3; ++k) {
      const int64_t count = packed ? all : counts[k];
      if (k == 0 || !packed) {
        first = uniform(0, 1) ? 0 : uniform(0, 9);
        int64_t apart = count;
        if (form == Form::gaps || form == Form::odd) apart += pick<int64_t>({1, 2, 3, 8});
        if (form == Form::planes) apart = 1, step = elements + pick<int64_t>({0, 3});
        if (form == Form::odd) step = 3, apart *= 3;
        stride[0] = n[1] * n[2] * apart, stride[1] = n[2] * apart, stride[2] = apart;
        if (form == Form::gaps) stride[1] += 5, stride[0] = n[1] * stride[1];
        if (form == Form::shared) stride[0] = 0, stride[1] = uniform(0, 1) ? 0 : stride[1];
        for (int d = std::max(p.shared_behind, 0); p.shared_behind >= 0 && d < 3; ++d) stride[d] = 0;
        const int64_t last = (n[0] - 1) * stride[0] + (n[1] - 1) * stride[1] + (n[2] - 1) * stride[2];
        array = add(p.parameter_type, first + (elements ? last : 0) + (count ? (count - 1) * step : 0) + 1);
      }
      place(operand + k, array, first + (packed ? before * step : 0), stride, step);
      before += counts[k];
    }
  }

  // Rows of the last dimension, or one row where every operand allows it.
  void walk(const Problem& p) {
    const int64_t* n = p.sizes;
    bool merges = p.merged;
    for (const auto& s : rows_stride) merges = merges && s[1] == s[2] * n[2] && s[0] == s[1] * n[1];
    e.count = n[0] * n[1] * n[2];
    e.n = merges ? e.count : n[2];
    e.rows.dims = merges ? 0 : 2;
    e.rows.count = merges ? 1 : n[0] * n[1];
    for (int d = 0; d < e.rows.dims; ++d) e.rows.size[d] = n[d];
    for (int k = 0; k < kSplineOperands; ++k) {
      e.stride[k] = rows_stride[k][2];
      for (int d = 0; d < e.rows.dims; ++d) e.rows.stride[k][d] = rows_stride[k][d];
    }
    e.type = p.type;
    e.parameter_type = p.parameter_type;
    e.logdet_type = p.type == Storage::f64 ? Storage::f64 : Storage::f32;
    e.summed = p.sample_dims >= 0 && !shared;
    e.samples = e.sample_size = 1;
    for (int d = 0; d < 3; ++d) (d < (shared ? p.shared_behind : p.sample_dims) ? e.samples : e.sample_size) *= n[d];
  }
  SplineElements on_host() const {
    SplineElements h = e;
    for (int k = 0; k < kSplineOperands; ++k)
      h.data[k] = where[k].array ? where[k].array->at(where[k].array->want.data(), where[k].first) : nullptr;
    if (sample_logdet) h.sample_logdet = sample_logdet->at(sample_logdet->want.data(), 0);
    if (bounds) h.bounds.data = bounds->at(bounds->want.data(), 0);
    if (mask) h.mask.data = mask->at(mask->want.data(), 0);
    if (shared) h.shared = reinterpret_cast<double*>(shared->at(shared->want.data(), 0));
    return h;
  }
  SplineElements on_device() const {
    SplineElements d = e;
    for (int k = 0; k < kSplineOperands; ++k)
      d.data[k] = where[k].array ? where[k].array->at(where[k].array->device, where[k].first) : nullptr;
    if (sample_logdet) d.sample_logdet = sample_logdet->at(sample_logdet->device, 0);
    if (bounds) d.bounds.data = bounds->at(bounds->device, 0);
    if (mask) d.mask.data = mask->at(mask->device, 0);
    if (shared) d.shared = reinterpret_cast<double*>(shared->at(shared->device, 0));
    if (to_others) {
      const auto data = [&](int k) { return others.arrays[k]->at(others.arrays[k]->device, others.first[k]); };
      if (!plan_other_channels(others.sizes, Others::kDims, others.channel, others.transformed, data(0),
                               others.strides[0], data(1), others.strides[1], storage_bytes(to_others->type), d.others))
        abort();
    }
    return d;
  }
};

template <class R>
struct Get {
  const R* from;
  PYPERF_HD R operator()(int j) const { return from[j]; }
};
template <class R>
struct Put {
  R* to;
  PYPERF_HD void operator()(int j, R value) const { to[j] = value; }
};

// What the kernels compute, one element after the other; sums, of log-dets or of shared gradients, as sums of
// magnitudes too.
template <bool kBackward, class R>
void reference(const SplineElements& e, const Spline<R>& c, std::vector<double>& sums,
               std::vector<double>& magnitudes) {
  using M = ScalarMachine<R>;
  const int bins = c.bins, counts[] = {bins, bins, c.derivatives()};
  std::vector<R> raw(size_t(3 * bins + 1)), put(raw.size()), ew(size_t(bins) + 0), eh(ew);
  const int parameters = 2 * bins + c.derivatives();
  sums.assign(size_t(e.shared ? e.samples * parameters : e.summed ? e.samples : 0), 0);
  magnitudes = sums;
  for (int64_t i = 0; i < e.count; ++i) {
    int64_t offsets[kSplineOperands];
    e.rows.offsets(i / e.n, offsets);
    const auto at = [&](int k, int64_t j, Storage type) {
      return static_cast<unsigned char*>(e.data[k]) +
             (offsets[k] + i % e.n * e.stride[k] + j * e.parameter_stride[k]) * storage_bytes(type);
    };
    for (int k = 0, before = 0; k < 3; before += counts[k++])
      for (int j = 0; j < counts[k]; ++j)
        raw[size_t(before + j)] = R(load(at(kWidths + k, j, e.parameter_type), e.parameter_type));
    const Get<R> w{raw.data()}, h{raw.data() + bins}, d{raw.data() + 2 * bins};
    math::SplinePoint<M> point;
    const R x = R(load(at(kInput, 0, e.type), e.type));
    const auto* bounds = static_cast<const unsigned char*>(e.bounds.data);
    const R bound =
        c.scaled ? R(load(bounds + e.bounds.offset(i) * storage_bytes(e.logdet_type), e.logdet_type)) : R(0);
    math::spline_locate<M, 0, true>(c, x, bound, w, h, d, ew.data(), eh.data(), point);
    if constexpr (kBackward) {
      const R grad_y = R(load(at(kGradOutput, 0, e.type), e.type));
      const R grad_logdet =
          R(e.summed
                ? load(static_cast<unsigned char*>(e.sample_logdet) + i / e.sample_size * storage_bytes(e.logdet_type),
                       e.logdet_type)
                : load(at(kLogdet, 0, e.logdet_type), e.logdet_type));
      const R grad_x = math::spline_gradients<M, 0, true>(c, point, grad_y, grad_logdet, w, h, ew.data(), eh.data(),
                                                          Put<R>{put.data()}, Put<R>{put.data() + bins},
                                                          Put<R>{put.data() + 2 * bins});
      const bool on = !e.mask.data || static_cast<const bool*>(e.mask.data)[e.mask.offset(i)];
      store(at(kResult, 0, e.type), e.type, double(on ? grad_x : grad_y));
      for (int j = 0; j < parameters; ++j) {
        R& gradient = put[size_t(j)];
        if (!on) gradient = 0;
        if (!e.shared) continue;
        sums[size_t(i / e.sample_size * parameters + j)] += double(gradient);
        magnitudes[size_t(i / e.sample_size * parameters + j)] += std::fabs(double(gradient));
      }
      if (e.shared) continue;
      for (int k = 0, before = 0; k < 3; before += counts[k++])
        for (int j = 0; j < counts[k]; ++j)
          store(at(kGradWidths + k, j, e.parameter_type), e.parameter_type, double(put[size_t(before + j)]));
    } else {
      R y, logdet;
      math::spline_value<M, true>(c, point, x, y, logdet);
      if (e.mask.data && !static_cast<const bool*>(e.mask.data)[e.mask.offset(i)]) y = x, logdet = 0;
      store(at(kResult, 0, e.type), e.type, double(y));
      if (!e.summed) store(at(kLogdet, 0, e.logdet_type), e.logdet_type, double(logdet));
      if (!e.summed) continue;
      sums[size_t(i / e.sample_size)] += double(logdet);
      magnitudes[size_t(i / e.sample_size)] += std::fabs(double(logdet));
    }
  }
}

inline void check_sums(Array& array, const std::vector<double>& sums, const std::vector<double>& magnitudes,
                       const std::string& what) {
  bool ok = true;
  for (size_t s = 0; s < sums.size(); ++s) {
    const double got = load(array.at(array.got.data(), int64_t(s)), array.type);
    const double rounding = array.type == Storage::f64 ? 0 : 1.2e-7 * std::fabs(sums[s]);
    if (!std::isfinite(magnitudes[s]))  // what overflows on the way depends on the order
      ok = ok && (!std::isnan(magnitudes[s]) || std::isnan(got));
    else
      ok = ok && std::fabs(got - sums[s]) <= rounding + 1e-12 * magnitudes[s];
    store(array.at(array.want.data(), int64_t(s)), array.type, got);
  }
  report(ok && array.right(), what);
}

#if !defined(__CUDACC__)
struct Serial {
  template <class Body>
  void operator()(int64_t count, int64_t, int64_t bytes, const Body& body) const {
    std::vector<float> memory(size_t(bytes) / 4 + 64);
    void* aligned = memory.data();
    size_t space = memory.size() * 4;
    std::align(64, size_t(bytes), aligned, space);
    if (count > 0) body(0, count, aligned);
  }
};

// The CPU's kernels on the same call: in `want` are the bits that they should give.
template <bool kBackward, class R>
void check_cpu(const Call& call, const Spline<R>& c, const std::vector<double>& magnitudes, const std::string& what) {
  std::vector<std::vector<unsigned char>> wanted;
  for (const auto& array : call.arrays) {
    wanted.push_back(array->want);
    std::swap(array->got, array->want);
  }
  const SplineElements e = call.on_host();
  const SampleUnits units(e.samples, e.sample_size);
  std::vector<double> partials(size_t((units.count + 1) * (2 * c.bins + c.derivatives())));
  if (e.count) baseline::spline<R, kBackward>(e, c, partials.data(), Serial());
  bool ok = true;
  for (size_t a = 0; a < wanted.size(); ++a) {
    Array& array = *call.arrays[a];
    array.got = wanted[a];
    if (&array == call.shared) {  // of which there may be another order
      for (int64_t i = 0; i < array.count(); ++i) {
        const double got = load(array.at(array.got.data(), i), Storage::f64),
                     want = load(array.at(array.want.data(), i), Storage::f64);
        const bool finite = std::isfinite(want) && std::isfinite(got);
        ok = ok &&
             (finite ? std::fabs(got - want) <= 1e-12 * magnitudes[size_t(i)] : !std::isfinite(magnitudes[size_t(i)]));
      }
    } else if (&array != call.sample_logdet) {
      ok = ok && array.right();
    }
    array.want = wanted[a];
  }
  report(ok, what + " (CPU)");
}
#endif

template <bool kBackward, class R>
void check(const Problem& p, const Spline<R>& c) {
  const std::string what = describe(p, kBackward ? "backward" : "forward") + (sizeof(R) == 8 ? " double" : " float") +
                           " tails " + std::to_string(int(c.tails)) + (c.inverse ? " inverse" : "") +
                           (c.exponential ? " zuko" : "") + (c.scaled ? " scaled" : "");
  const int64_t counts[3] = {c.bins, c.bins, c.derivatives()};
  const Storage logdet_type = p.type == Storage::f64 ? Storage::f64 : Storage::f32;
  const int64_t samples = [&] {
    int64_t n = 1;
    for (int d = 0; d < p.sample_dims; ++d) n *= p.sizes[d];
    return n;
  }();
  Call call;
  if (p.others) call.add_others(p.type);
  call.add_scalars(p, kInput, p.type);
  call.add_parameters(p, kWidths, p.form, p.packed, counts);
  if (c.scaled) call.bounds = call.add_aside(p, logdet_type, storage_bytes(logdet_type), call.e.bounds);
  if (p.masked) call.mask = call.add_aside(p, Storage::f16, 1, call.e.mask);
  const bool shares = kBackward && p.shared_behind >= 0, summed = p.sample_dims >= 0 && !shares;
  if (kBackward) call.add_scalars(p, kGradOutput, p.type);
  if (kBackward && !summed) call.add_scalars(p, kLogdet, logdet_type);
  if (summed && kBackward) call.sample_logdet = call.add(logdet_type, samples);
  for (const auto& array : call.arrays) array->fill(array->type == p.parameter_type ? parameter : anything);
  call.where[kInput].array->fill(anything);
  if (c.scaled) call.bounds->fill(bound);
  if (p.masked) {
    auto& bytes = call.mask->got;
    for (size_t i = size_t(Array::kGuard); i < bytes.size() - size_t(Array::kGuard); ++i) bytes[i] = uniform(0, 2) > 0;
    call.mask->want = bytes;
  }
  if (p.others && p.sizes[0] * p.sizes[1] * p.sizes[2] > 0)
    call.others.each([&](int64_t from, int64_t to) {
      store(call.to_others->at(call.to_others->want.data(), to), p.type,
            load(call.others.arrays[0]->at(call.others.arrays[0]->want.data(), from), p.type));
    });
  const size_t inputs = call.arrays.size();
  call.add_scalars(p, kResult, p.type);
  if (!kBackward && p.sample_dims < 0) call.add_scalars(p, kLogdet, logdet_type);
  if (!kBackward && p.sample_dims >= 0) call.sample_logdet = call.add(logdet_type, samples);
  if (shares) {
    int64_t sets = 1;
    for (int d = 0; d < p.shared_behind; ++d) sets *= p.sizes[d];
    call.shared = call.add(Storage::f64, sets * (counts[0] + counts[1] + counts[2]));
  } else if (kBackward) {
    call.add_parameters(p, kGradWidths, p.gradient_form, p.packed ? uniform(0, 3) : !uniform(0, 3), counts);
  }
  call.walk(p);
  call.e.packed = p.packed;
  if (kBackward) {
    const auto& w = call.where;
    call.e.grads_packed = w[kGradHeights].array == w[kGradWidths].array;
  }
  std::vector<double> sums, magnitudes;
  reference<kBackward>(call.on_host(), c, sums, magnitudes);
  for (const auto& array : call.arrays) array->upload();
  const SplineElements e = call.on_device();
  const int64_t bytes = spline_workspace_bytes<kBackward>(e, c);
  void* workspace = nullptr;
  require(cudaMalloc(&workspace, size_t(bytes)), "cudaMalloc");
#if !defined(__CUDACC__)
  const int64_t before = emulator::launches;
#endif
  require(spline<kBackward>(e, c, workspace, cudaStream_t{}), what.c_str());
  require(cudaDeviceSynchronize(), what.c_str());
#if !defined(__CUDACC__)
  const bool rows = e.count > 0, sums_apart = bytes > 0 || (!kBackward && e.summed && !rows && e.samples > 0);
  report(emulator::launches - before == int(rows) + int(sums_apart), what + ": launches");
#endif
  cudaFree(workspace);
  for (const auto& array : call.arrays) array->download();
  bool ok = true;
  for (const auto& array : call.arrays)
    if (array.get() != call.shared && (kBackward || array.get() != call.sample_logdet)) ok = ok && array->right();
  report(ok, what);
  if (!kBackward && e.summed) check_sums(*call.sample_logdet, sums, magnitudes, what + ": sums");
  if (shares && e.count) check_sums(*call.shared, sums, magnitudes, what + ": shared");
#if !defined(__CUDACC__)
  for (size_t a = inputs; a < call.arrays.size(); ++a)
    std::fill(call.arrays[a]->got.begin(), call.arrays[a]->got.end(), 0xcd);
  check_cpu<kBackward>(call, c, magnitudes, what);
#else
  (void)inputs;
#endif
}

inline void check(Problem p) {
  const bool exact = uniform(0, 3) == 0 || p.type == Storage::f64 || p.parameter_type == Storage::f64;
  if (p.shared_behind >= 0) p.parameter_type = exact ? Storage::f64 : Storage::f32;  // as the caller has it
  const Tails tails = Tails(uniform(0, 3));
  const bool scaled = tails == Tails::mixed || uniform(0, 2) == 0;
  const bool inverse = uniform(0, 1), exponential = uniform(0, 3) == 0;
  const double bound = pick({1.0, 3.0, 3.0, 50.0}), least = exponential ? 0 : 1e-3;
  const double box[] = {-bound, bound, tails == Tails::bounded ? 0 : -bound, bound}, smallest[] = {least, least, least};
  const double scale = pick({1.0, 0.25}), curve = exponential ? 6.9 : pick({1.0, 0.7});
  scale_of_parameters = pick({0.0, 1.0, 1.0, 1.0, 5.0, 100.0, 1e4});
  special_parameters = uniform(0, 2) == 0;
  const auto run = [&](auto zero) {
    const auto c =
        make_spline<decltype(zero)>(p.bins, tails, inverse, exponential, scaled, box, smallest, scale, curve);
    check<false>(p, c);
    check<true>(p, c);
  };
  exact ? run(0.0) : run(0.0f);
}

inline Problem random_problem(int bins) {
  Problem p{};
  const int64_t most = bins > 64 ? 3 : bins > 16 ? 9 : 13;
  for (int64_t& n : p.sizes) n = uniform(1, most);
  if (uniform(0, 2) == 0 && bins <= 64) p.sizes[2] = pick<int64_t>({31, 64, 65, 127, 128, 129, 200});
  if (p.sizes[2] > 31) p.sizes[uniform(0, 1)] = 1;
  if (uniform(0, 15) == 0) p.sizes[uniform(0, 2)] = 0;
  p.sample_dims = int(uniform(-2, 3));
  if (p.sample_dims < 0) p.sample_dims = -1;
  p.bins = bins;
  p.type = pick({Storage::f32, Storage::f32, Storage::f32, Storage::f64, Storage::f16, Storage::bf16});
  p.parameter_type = p.type == Storage::f32 ? pick({Storage::f32, Storage::f32, Storage::f16, Storage::bf16}) : p.type;
  p.form = pick({Form::dense, Form::dense, Form::gaps, Form::planes, Form::odd, Form::shared});
  p.gradient_form = pick({Form::dense, Form::dense, Form::dense, Form::gaps, Form::planes, Form::odd});
  p.scalars_dense = uniform(0, 2);
  p.packed = uniform(0, 1);
  p.merged = uniform(0, 1);
  p.masked = uniform(0, 3) == 0;
  p.others = uniform(0, 2) == 0;
  p.shared_behind = uniform(0, 3) ? -1 : int(uniform(0, 2));
  return p;
}

inline void check_random(int rounds) {
  constexpr int kBins[] = {8, 5, 10, 16, 32, 1, 2, 3, 4, 7, 11, 17, 33};
  for (int round = 0; round < rounds; ++round) {
    check(random_problem(round % 50 == 30 ? 100 : round % 50 == 49 ? 256 : kBins[round % 13]));
  }
}

// Samples of several tiles: a block walks them, or there are partial sums.
inline void check_large_samples(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    Problem p = random_problem(pick({1, 2, 5, 8}));
    p.sizes[0] = uniform(1, 3), p.sizes[1] = uniform(1, 3), p.sizes[2] = uniform(129, 700);
    p.sample_dims = int(uniform(0, 2));
    check(p);
  }
}

// Enough large samples for one block each.
inline void check_many_samples() {
  Problem p = random_problem(2);
  p.sizes[0] = 520, p.sizes[1] = 1, p.sizes[2] = 530;
  p.sample_dims = 1;
  check(p);
}

inline int summary() {
  printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}

}  // namespace test
