// g++ -std=c++20 -O1 -ffp-contract=off [-fsanitize=address,undefined] coupling_affine_cuda.cpp: the CUDA kernels of
// affine couplings on a CPU, with the threads of a block in three orders, against the formula in double.
#include "cuda_emulator.h"
//
#include <algorithm>
#include <limits>
#include <memory>

#include "../../kernels/cuda/coupling_affine.cuh"

namespace {

using namespace pyperf;
using namespace pyperf::coupling;

int passed = 0, failed = 0;
uint64_t state = 1;

uint32_t next() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return uint32_t(state >> 33);
}
int64_t below(int64_t n) { return int64_t(next() % uint64_t(n)); }
double normal() {
  double sum = -6;
  for (int i = 0; i < 12; ++i) sum += next() / 2147483648.0;
  return sum;
}

double log_scale(const Affine& how, double u) {
  switch (how.activation) {
    case Activation::none: return 0;
    case Activation::exp: return std::min(std::max(u, -how.clamp), how.clamp);
    case Activation::sigmoid: return -std::log1p(std::exp(-(u + 2)));
    case Activation::softplus: return std::log(std::log1p(std::exp(u)));
    case Activation::tanh: return how.clamp * std::tanh(u);
    case Activation::atan: return how.clamp * 0.636 * std::atan(u);
    case Activation::softclip: return u / (1 + std::fabs(u / how.clamp));
    case Activation::sigmoid_floor:
      return std::log(std::min(how.min_scale + 1 / (1 + std::exp(-(u + 2))), how.max_scale));
    case Activation::softplus_floor: return std::log(std::min(how.min_scale + std::log1p(std::exp(u)), how.max_scale));
  }
  return 0;
}

// Whether the slope bends or jumps within `step` of u.
bool has_kink(const Affine& how, double u, double step) {
  const double last = std::log(how.max_scale);
  switch (how.activation) {
    case Activation::exp: return std::fabs(std::fabs(u) - how.clamp) < step;
    case Activation::softclip: return std::fabs(u) < step;
    case Activation::sigmoid_floor:
    case Activation::softplus_floor: return log_scale(how, u - step) < last && log_scale(how, u + step) >= last;
    default: return false;
  }
}

// An operand of [samples, size], whose elements lie `stride` apart and whose rows `pitch`.
struct Operand {
  std::shared_ptr<unsigned char[]> memory;  // copies are the same operand
  unsigned char* data;
  Storage type;
  int64_t stride, pitch;
  double unit;  // rounding of its dtype

  Operand(int64_t samples, int64_t size, Storage type, int64_t stride, int64_t gap, bool aligned)
      : type(type), stride(stride), pitch(size * stride + gap) {
    memory.reset(new unsigned char[size_t(samples * pitch) * storage_bytes(type) + 32 + 8 * samples]());
    const uintptr_t begin = reinterpret_cast<uintptr_t>(memory.get());
    data = memory.get() + (16 - begin % 16) % 16 + (aligned ? 0 : storage_bytes(type));
    unit = type == Storage::f64 ? 1e-16 : type == Storage::f32 ? 6e-8 : type == Storage::f16 ? 5e-4 : 4e-3;
  }
  void* at(int64_t s, int64_t i) { return data + (s * pitch + i * stride) * storage_bytes(type); }
  double get(int64_t s, int64_t i) {
    double value = 0;
    with_storage(type, [&](auto t) {
      memcpy(&t, at(s, i), sizeof t);
      value = loaded<double>(t);
    });
    return value;
  }
  void set(int64_t s, int64_t i, double value) {
    with_storage(type, [&](auto t) {
      t = stored<decltype(t)>(value);
      memcpy(at(s, i), &t, sizeof t);
    });
  }
  double filled(int64_t s, int64_t i, double value) {
    set(s, i, value);
    return get(s, i);
  }
};

void check(bool good, const char* what, double got, double want) {
  good ? ++passed : ++failed;
  if (!good && failed < 20) std::printf("%s: got %.9g, want %.9g\n", what, got, want);
}
void check_near(const char* what, double got, double want, double size, double unit) {
  check(std::fabs(got - want) <= 8 * unit * (std::fabs(want) + size), what, got, want);
}

template <int N>
AffineCall<N> call_of(const Affine& how, std::vector<Operand>& o, int64_t samples, int64_t size, bool summed) {
  AffineCall<N> call{};
  call.how = how;
  bool flat = true;
  for (int k = 0; k < N; ++k) flat &= o[k].pitch == size * o[k].stride;
  call.rows.count = flat ? 1 : samples;
  call.rows.dims = flat ? 0 : 1;
  call.rows.size[0] = samples;
  call.n = flat ? samples * size : size;
  for (int k = 0; k < N; ++k) {
    call.rows.stride[k][0] = o[k].pitch;
    call.stride[k] = o[k].stride;
    call.data[k] = o[k].data;
    call.type[k] = o[k].type;
  }
  call.samples = summed ? samples : 1;
  call.sample_size = summed ? size : samples * size;
  call.summed = summed;
  return call;
}

// Rows of eight channels, of which 1, 3 and 5 are transformed.
struct Passing {
  static constexpr int64_t kSizes[] = {37, 8}, kStrides[] = {8, 1};
  std::vector<float> from, to;

  Passing() : from(37 * 8), to(from.size(), -1) {
    for (float& v : from) v = float(normal());
  }
  OtherChannels plan() {
    OtherChannels others;
    plan_other_channels(kSizes, 2, 1, {1, 2, 3}, from.data(), kStrides, to.data(), kStrides, 4, others);
    return others;
  }
  void checked() const {
    for (size_t i = 0; i < from.size(); ++i) {
      const bool transformed = i % 8 == 1 || i % 8 == 3 || i % 8 == 5;
      check(to[i] == (transformed ? -1 : from[i]), "others", to[i], from[i]);
    }
  }
};

template <class R>
void round_of(int64_t samples, int64_t size) {
  const Storage wide = sizeof(R) == 8 ? Storage::f64 : Storage::f32, types[] = {wide, Storage::f16, Storage::bf16};
  const Storage of_parameters = sizeof(R) == 8 ? wide : types[below(3)];
  const Storage of_x = of_parameters == wide || below(2) ? wide : of_parameters;
  const bool summed = below(3) > 0, inverse = below(2), first = below(2), aligned = below(4) > 0;
  Affine how{};
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  how.activation = Activation(below(9));
  how.clamp = how.activation == Activation::exp && below(2) ? kInfinity : 1.5;
  how.min_scale = 1e-3;
  how.max_scale = below(2) ? kInfinity : 0.9;
  how.scale_sign = inverse ? -1 : 1;
  how.shift_sign = inverse ? -1 : 1;
  how.shift_before = inverse != first;
  const auto operand = [&](Storage type) {
    const bool plain = below(4) > 0;
    return Operand(samples, size, type, plain ? 1 : 2, plain && below(2) ? 0 : 4 * below(3), aligned);
  };
  const auto dense = [&](Storage type) { return Operand(samples, size, type, 1, 0, aligned); };

  std::vector<Operand> f{operand(of_x), operand(of_parameters), operand(of_parameters), dense(wide), dense(of_x)};
  std::vector<Operand> b{operand(of_x),          dense(wide),          operand(of_x),        operand(of_parameters),
                         operand(of_parameters), dense(of_parameters), dense(of_parameters), dense(of_x)};
  for (int64_t s = 0; s < samples; ++s)
    for (int64_t i = 0; i < size; ++i) {
      const double x = normal(), u = 2 * normal(), t = normal();
      f[kX].set(s, i, x), f[kScale].set(s, i, u), f[kShift].set(s, i, t);
      b[kOfX].set(s, i, x), b[kOfScale].set(s, i, u), b[kOfShift].set(s, i, t);
      b[kGradY].set(s, i, normal()), b[kGradLogdet].set(s, i, normal());
    }
  auto forward = call_of<kForwardOperands>(how, f, samples, size, summed);
  auto backward = call_of<kBackwardOperands>(how, b, samples, size, summed);
  std::vector<R> sums(samples + 1, R(-77));
  R* const sample_grads = reinterpret_cast<R*>(b[kGradLogdet].data);
  if (summed) forward.data[kLogdet] = sums.data();
  Passing passed_on, passed_back;
  if (size > 0) forward.others = passed_on.plan(), backward.others = passed_back.plan();
  std::vector<unsigned char> workspace(affine_workspace_bytes(forward));
  check(affine_forward<R>(forward, workspace.data(), nullptr) == cudaSuccess, "launch", 0, 0);
  check(affine_backward<R>(backward, nullptr) == cudaSuccess, "launch", 0, 0);
  if (size > 0) passed_on.checked(), passed_back.checked();

  const double r = sizeof(R) == 8 ? 1e-16 : 6e-8;
  for (int64_t s = 0; s < samples; ++s) {
    long double total = 0;  // exact beside the sums of the kernels
    double size_of_total = 1;
    for (int64_t i = 0; i < size; ++i) {
      const double x = f[kX].get(s, i), u = f[kScale].get(s, i), t = how.shift_sign * f[kShift].get(s, i);
      const double log = how.scale_sign * log_scale(how, u), e = std::exp(log);
      const double y = how.shift_before ? (x + t) * e : x * e + t, moved = how.shift_before ? (x + t) * e : x * e;
      const double terms = (std::fabs(x) + std::fabs(t)) * (1 + e) * (1 + std::fabs(log));
      check(std::fabs(f[kY].get(s, i) - y) <= f[kY].unit * std::fabs(y) + 8 * r * terms, "y", f[kY].get(s, i), y);
      if (!summed) check_near("log-det", f[kLogdet].get(s, i), log, 1, r);
      total += log, size_of_total += std::fabs(log);
      const double step = 1e-5,
                   slope = how.scale_sign * (log_scale(how, u + step) - log_scale(how, u - step)) / (2 * step);
      const double gy = b[kGradY].get(s, i), gl = summed ? double(sample_grads[s]) : b[kGradLogdet].get(s, i);
      const double grad_shift = how.shift_sign * (how.shift_before ? gy * e : gy);
      const double size_of_grads = std::fabs(gy) * (1 + terms) + std::fabs(gl);
      check_near("grad x", b[kGradX].get(s, i), gy * e, size_of_grads, b[kGradX].unit);
      check_near("grad shift", b[kGradShift].get(s, i), grad_shift, size_of_grads, b[kGradShift].unit);
      if (!has_kink(how, u, 2 * step))  // where the slope is that of differences
        check_near("grad scale", b[kGradScale].get(s, i), slope * (gy * moved + gl), size_of_grads,
                   std::max(b[kGradScale].unit, 1e-9));
    }
    if (summed) check_near("sum", double(sums[s]), double(total), size_of_total, 8 * r);
  }
  check(sums[samples] == R(-77), "behind the sums", double(sums[samples]), -77);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 120;
  using emulator::Order;
  for (const Order order : {Order::ascending, Order::descending, Order::shuffled}) {
    emulator::order = order;
    emulator::max_grid = order == Order::ascending ? int64_t(1) << 31 : 3;
    const int64_t sizes[] = {1, 2, 3, 4, 6, 8, 12, 31, 64, 257, 1000, 1024, 2052};
    for (int i = 0; i < rounds; ++i) {
      round_of<float>(1 + below(7), sizes[below(13)]);
      round_of<double>(1 + below(7), sizes[below(13)]);
    }
    for (const int64_t size : {4096, 4097, 9000, 20004}) {
      round_of<float>(2, size);
      round_of<double>(1, size);
    }
    round_of<float>(3, 0);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
