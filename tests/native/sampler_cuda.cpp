// g++ -std=c++20 -O1 -ffp-contract=off [-fsanitize=address,undefined] sampler_cuda.cpp: the CUDA kernels of samplers on
// a CPU, with the threads of a block in three orders: the bits of the CPU's kernels, and the numbers of torch.randn on
// CUDA as its formulas have them.
#include "cuda_emulator.h"
//
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "../../kernels/common/sample_units.h"
#include "../../kernels/cuda/sampler.cuh"
#include "../../kernels/cuda/sampler_adjustments.cuh"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pyperf::baseline {
#define PYPERF_VECTOR_BYTES 16
#include "../../kernels/cpu/sampler.h"
#undef PYPERF_VECTOR_BYTES
}  // namespace pyperf::baseline

namespace {

using namespace pyperf;
using namespace pyperf::sampler;

int passed = 0, failed = 0;
uint64_t state = 1;

uint32_t next() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return uint32_t(state >> 33);
}
int64_t below(int64_t n) { return int64_t(next() % uint64_t(n)); }
bool coin() { return below(2); }
double normal() {
  double sum = -6;
  for (int i = 0; i < 12; ++i) sum += next() / 2147483648.0;
  return sum;
}

struct OneThread {
  template <class Body>
  void operator()(int64_t count, int64_t, int64_t scratch_bytes, const Body& body) const {
    std::vector<double> scratch(scratch_bytes / sizeof(double) + 1);
    body(0, count, scratch.data());
  }
};

// Memory of an operand, which may lie off a vector's border, with gaps between samples.
class Operand {
 public:
  Operand(Storage type, int64_t samples, int64_t size, bool regular, bool filled)
      : type_(type), shift_(regular ? 0 : below(4)), stride_(size + (regular ? 0 : below(3) * 3 + below(2) * 8)) {
    const int64_t count = shift_ + samples * stride_;
    memory_.resize((count * storage_bytes(type) + 15) / 16 * 2, 0xdeadbeefdeadbeefull);
    for (int64_t i = 0; filled && i < count; ++i) set(i, normal());
  }

  Elements elements() { return {bytes() + shift_ * storage_bytes(type_), stride_}; }
  double get(int64_t sample, int64_t i) { return value(shift_ + sample * stride_ + i); }

  void check_same(Operand& want, const char* what) {
    int64_t wrong = -1;
    for (int64_t i = 0; i < int64_t(memory_.size()) * 8 / storage_bytes(type_); ++i) {
      const int64_t n = storage_bytes(type_);
      const bool same = memcmp(bytes() + i * n, want.bytes() + i * n, n) == 0;
      if (!same && !(std::isnan(value(i)) && std::isnan(want.value(i)))) wrong = i;
    }
    wrong < 0 ? ++passed : ++failed;
    if (wrong >= 0 && failed < 20)
      std::printf("%s, dtype %d, place %lld: got %.17g, want %.17g\n", what, int(type_), (long long)wrong, value(wrong),
                  want.value(wrong));
  }

 private:
  std::vector<uint64_t> memory_;  // two by two: 16 bytes
  Storage type_;
  int64_t shift_, stride_;

  char* bytes() { return reinterpret_cast<char*>(memory_.data()); }
  double value(int64_t i) {
    double v = 0;
    with_storage(type_, [&](auto t) {
      memcpy(&t, bytes() + i * sizeof t, sizeof t);
      v = loaded<double>(t);
    });
    return v;
  }
  void set(int64_t i, double v) {
    with_storage(type_, [&](auto t) {
      t = stored<decltype(t)>(v);
      memcpy(bytes() + i * sizeof t, &t, sizeof t);
    });
  }
};

void check(bool good, const char* what, double got, double want) {
  good ? ++passed : ++failed;
  if (!good && failed < 20) std::printf("%s: got %.9g, want %.9g\n", what, got, want);
}

// ---- problems ----

enum class Noise { none, operand, keys, generator };

struct Problem {
  StepCall call{};
  Noise noise;
  std::vector<double> table, guidance, adjust;
  std::vector<int64_t> step, key, seed_and_offset;
  std::vector<Operand> operands;  // of inputs, which must not move
  bool regular;

  Problem(int64_t samples, int64_t size, int kind, bool for_gradients) : regular(below(3) > 0) {
    constexpr Storage kTypes[6][2] = {{Storage::f32, Storage::f32},   {Storage::f32, Storage::f16},
                                      {Storage::f32, Storage::bf16},  {Storage::f16, Storage::f16},
                                      {Storage::bf16, Storage::bf16}, {Storage::f64, Storage::f64}};
    call.type = kTypes[kind][0], call.output_type = kTypes[kind][1];
    call.samples = samples, call.sample_size = size;
    call.copies = below(3);
    call.group = coin() ? samples : 1;
    constexpr int64_t kRows = 4;
    for (int64_t i = 0; i < kRows * kColumns; ++i) table.push_back(below(6) ? normal() : 0.0);
    call.table = table.data(), call.rows = kRows;
    const auto count = [&] { return coin() ? samples : 1; };
    call.row = below(20) ? below(kRows) : -1, call.guidance_scale = normal();
    call.steps = call.guidances = call.adjusts = call.keys = 1;
    if (coin()) {
      for (call.steps = count(); int64_t(step.size()) < call.steps;) step.push_back(below(20) ? below(kRows) : kRows);
      call.step = step.data();
    }
    if (coin()) {
      for (call.guidances = count(); int64_t(guidance.size()) < call.guidances;) guidance.push_back(normal());
      call.guidance = guidance.data();
    }
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    call.low = coin() ? -kInfinity : -0.7, call.high = coin() ? kInfinity : 0.8;
    if (!for_gradients && below(3) == 0) {
      for (call.adjusts = count(); int64_t(adjust.size()) < 2 * call.adjusts;) {
        adjust.push_back(1 + 0.1 * normal());
        adjust.push_back(coin() ? kInfinity : 1 + 0.1 * below(5));
      }
      call.adjust = adjust.data();
    }
    noise = Noise(below(call.type == Storage::f64 ? 3 : 4));
    if (noise == Noise::keys) {
      for (call.keys = count(); int64_t(key.size()) < call.keys;) key.push_back(int64_t(next()) << 33 ^ next());
      call.key = key.data();
    }
    if (noise == Noise::generator) set_generator();
    operands.reserve(kInputs);
  }

  void set_generator() {
    call.draws = true;
    seed_and_offset = {int64_t(next()) << 33 ^ next(), 4 * int64_t(next())};
    call.offset = 4 * below(100);
    if (coin()) {
      call.state = seed_and_offset.data();
    } else {
      call.seed = uint64_t(seed_and_offset[0]);
      call.offset += uint64_t(seed_and_offset[1]);
    }
    call.threads = 256 * std::min((call.samples * call.sample_size + 255) / 256, 1 + below(4));
  }

  bool is_models(int k) const { return k == kOutput || k == kUnconditional || k == kVariance || k == kModelInput; }
  Operand made(int k, bool filled) const {
    return Operand(is_models(k) ? call.output_type : call.type, call.samples, call.sample_size, regular, filled);
  }
  void give(int k) {
    operands.push_back(made(k, true));
    call.operand[k] = operands.back().elements();
  }
  Operand model_input(bool filled) const {
    return Operand(call.output_type, 1, call.copies * call.samples * call.sample_size, regular, filled);
  }
};

int64_t few() { return coin() ? 0 : kFewVectors; }

// What a CPU is asked for: the noise of a generator is an operand there.
StepCall for_cpu(const Problem& p, Operand& drawn) {
  StepCall call = p.call;
  if (p.noise != Noise::generator) return call;
  StepCall noise_call = p.call;
  noise_call.operand[kNext] = drawn.elements();
  check(noise(noise_call, nullptr) == cudaSuccess, "launch", 0, 0);
  call.draws = false;
  call.operand[kNoise] = drawn.elements();
  return call;
}

void check_step(int64_t samples, int64_t size, int kind) {
  Problem p(samples, size, kind, false);
  const bool plain = below(3) == 0;
  p.give(kSample), p.give(kOutput);
  if (coin()) p.give(kUnconditional), p.call.guided = true;
  if (!plain) {
    for (const int k : {kVariance, kHistory1, kHistory2, kHistory3, kLast})
      if (below(3) == 0) p.give(k);
    if (p.noise == Noise::operand) p.give(kNoise);
    p.call.corrects = p.call.has(kLast);
  }
  Operand drawn(p.call.type, samples, size, true, false);
  StepCall on_cpu = for_cpu(p, drawn), on_cuda = p.call;
  std::vector<Operand> got, want;
  for (int k = kNext; k < kOperands; ++k) {
    const bool asked = k == kNext || (k == kModelInput  ? p.call.copies > 0 && below(2)
                                      : k == kCorrected ? p.call.corrects
                                                        : !plain && below(2));
    if (!asked) continue;
    got.push_back(k == kModelInput ? p.model_input(false) : p.made(k, false));
    want.push_back(got.back());  // the same strides, and memory of its own
    on_cuda.operand[k].stride = on_cpu.operand[k].stride = k;
  }
  int i = 0;
  for (int k = kNext; k < kOperands; ++k) {
    if (on_cuda.operand[k].stride != k) continue;
    on_cuda.operand[k] = got[i].elements(), on_cpu.operand[k] = want[i].elements();
    ++i;
  }
  check(step(on_cuda, nullptr, few()) == cudaSuccess, "launch", 0, 0);
  baseline::step(on_cpu, nullptr, OneThread());
  for (size_t k = 0; k < got.size(); ++k) got[k].check_same(want[k], "step");
}

// Sums have the CPU's values but for their order.
void check_transition(int64_t samples, int64_t size, int kind) {
  Problem p(samples, size, kind, false);
  if (p.noise == Noise::generator) return;
  for (size_t k = kZ; k < p.table.size(); k += kColumns) p.table[k] = 0.5 + 0.1 * std::fabs(p.table[k]);
  p.give(kSample), p.give(kOutput);
  if (coin()) p.give(kUnconditional), p.call.guided = true;
  for (const int k : {kVariance, kHistory1, kLast})
    if (below(3) == 0) p.give(k);
  p.call.corrects = p.call.has(kLast);
  if (p.noise == Noise::operand) p.give(kNoise);
  Operand target = p.made(kNext, true);
  StepCall on_cuda = p.call;
  if (p.noise == Noise::none) on_cuda.target = target.elements(), on_cuda.copies = 0;
  StepCall on_cpu = on_cuda;
  Operand got = p.made(kNext, false), want = got, got_input = p.model_input(false), want_input = got_input;
  Operand got_corrected = p.made(kNext, false), want_corrected = got_corrected;
  Operand got_score(on_cuda.log_prob_type(), samples, size, p.regular, false), want_score = got_score;
  if (!on_cuda.target.data) on_cuda.operand[kNext] = got.elements(), on_cpu.operand[kNext] = want.elements();
  if (on_cuda.copies) {
    on_cuda.operand[kModelInput] = got_input.elements(), on_cpu.operand[kModelInput] = want_input.elements();
  }
  if (on_cuda.corrects) {
    on_cuda.operand[kCorrected] = got_corrected.elements(), on_cpu.operand[kCorrected] = want_corrected.elements();
  }
  if (coin()) on_cuda.score = got_score.elements(), on_cpu.score = want_score.elements();
  std::vector<double> got_sums(samples, -1.0), want_sums(samples, -2.0);
  const int64_t fewest = few();
  std::vector<double> partials(transition_partials(on_cuda, fewest)), of_runs(samples * on_cpu.runs());
  on_cuda.log_prob = got_sums.data(), on_cpu.log_prob = want_sums.data();
  check(transition(on_cuda, partials.data(), nullptr, fewest) == cudaSuccess, "launch", 0, 0);
  baseline::step(on_cpu, of_runs.data(), OneThread());
  got.check_same(want, "transition"), got_input.check_same(want_input, "input of a transition");
  got_corrected.check_same(want_corrected, "correction of a transition"), got_score.check_same(want_score, "score");
  const bool wide = p.call.type == Storage::f64;
  for (int64_t s = 0; s < samples; ++s) {
    const double a = wide ? got_sums[s] : reinterpret_cast<float*>(got_sums.data())[s];
    const double b = wide ? want_sums[s] : reinterpret_cast<float*>(want_sums.data())[s];
    check(std::fabs(a - b) <= (wide ? 1e-12 : 3e-7) * (double(size) + std::fabs(b)) || (a != a && b != b),
          "log-probability", a, b);
  }
}

void check_gradients(int64_t samples, int64_t size, int kind) {
  Problem p(samples, size, kind, true);
  p.call.guided = coin(), p.call.corrects = coin();
  if (p.call.clips()) {
    p.give(kSample), p.give(kOutput);
    if (p.call.guided) p.give(kUnconditional);
  }
  if (p.noise != Noise::none && coin()) p.give(kVariance);
  if (p.noise == Noise::operand) p.give(kNoise);
  const bool learned = p.call.has(kVariance);
  Operand drawn(p.call.type, samples, size, true, false), score(p.call.log_prob_type(), samples, size, true, true);
  const bool of_transition = p.noise != Noise::generator && below(3) == 0;
  if (of_transition) p.call.score = score.elements();
  StepCall on_cpu = for_cpu(p, drawn);
  StepGradients on_cuda{}, as_cpu{};
  std::vector<double> of_log_prob(samples);
  for (int64_t s = 0; s < samples; ++s)
    if (p.call.type == Storage::f64)
      of_log_prob[s] = normal();
    else
      reinterpret_cast<float*>(of_log_prob.data())[s] = float(normal());
  on_cuda.of_log_prob = as_cpu.of_log_prob = of_log_prob.data();
  std::vector<Operand> given, got, want;
  given.reserve(kOutputs), got.reserve(kInputs), want.reserve(kInputs);
  for (int k = 0; k < kOutputs; ++k) {
    const int operand = kNext + k;
    if (operand == kModelInput ? p.call.copies == 0 : operand == kCorrected ? !p.call.corrects : coin()) continue;
    given.push_back(operand == kModelInput ? p.model_input(true) : p.made(operand, true));
    on_cuda.of_output[k] = as_cpu.of_output[k] = given.back().elements();
  }
  for (int k = 0; k < kInputs; ++k) {
    if (coin() || (k == kVariance && !learned) || (k == kUnconditional && !p.call.guided)) continue;
    got.push_back(p.made(k, false)), want.push_back(got.back());
    on_cuda.of_input[k] = got.back().elements(), as_cpu.of_input[k] = want.back().elements();
  }
  check(step_backward(p.call, on_cuda, nullptr, few()) == cudaSuccess, "launch", 0, 0);
  baseline::step_backward(on_cpu, as_cpu, OneThread());
  for (size_t k = 0; k < got.size(); ++k) got[k].check_same(want[k], "gradients");
}

void check_keyed_noise(int64_t samples, int64_t size, int kind) {
  Problem p(samples, size, kind, true);
  if (p.noise != Noise::keys) return;
  p.call.step = nullptr;
  Operand got = p.made(kSample, false), want = got;
  StepCall on_cpu = p.call;
  p.call.operand[kNext] = got.elements(), on_cpu.operand[kNext] = want.elements();
  check(noise(p.call, nullptr, few()) == cudaSuccess, "launch", 0, 0);
  baseline::noise(on_cpu, OneThread());
  got.check_same(want, "noise");
}

// ---- numbers of torch.randn on CUDA ----

void philox(uint64_t seed, uint64_t subsequence, uint64_t number, uint32_t (&c)[4]) {
  c[0] = uint32_t(number), c[1] = uint32_t(number >> 32);
  c[2] = uint32_t(subsequence), c[3] = uint32_t(subsequence >> 32);
  uint32_t low = uint32_t(seed), high = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t(0xd2511f53u) * c[0], second = uint64_t(0xcd9e8d57u) * c[2];
    const uint32_t made[4] = {uint32_t(second >> 32) ^ c[1] ^ low, uint32_t(second),
                              uint32_t(first >> 32) ^ c[3] ^ high, uint32_t(first)};
    memcpy(c, made, sizeof made);
    low += 0x9e3779b9u, high += 0xbb67ae85u;
  }
}

double number_of_randn(uint64_t seed, uint64_t offset, int64_t threads, int64_t element) {
  const int64_t turn = element / (4 * threads), in_turn = element % (4 * threads);
  const int64_t component = in_turn / threads;
  uint32_t words[4];
  philox(seed, uint64_t(in_turn % threads), offset / 4 + uint64_t(turn), words);
  // Rounded to float, as that decides how large a small radius is.
  const double u = std::fmaf(float(words[component / 2 * 2]), 0x1p-32f, 0x1p-33f);
  const double v = std::fmaf(float(words[component / 2 * 2 + 1]), 0x1p-32f, 0x1p-33f) * 6.283185307179586;
  const double radius = std::sqrt(-2 * std::log(u));
  return radius * (component % 2 ? std::cos(v) : std::sin(v));
}

void check_drawn_noise(int64_t samples, int64_t size, int kind) {
  Problem p(samples, size, kind, true);
  if (p.call.type == Storage::f64) return;
  p.call.key = nullptr;
  p.set_generator();
  const bool by_value = !p.call.state;
  const uint64_t offset = p.call.offset + (by_value ? 0 : uint64_t(p.seed_and_offset[1]));
  Operand got(p.call.type, samples, size, true, false);
  p.call.operand[kNext] = got.elements();
  check(noise(p.call, nullptr, few()) == cudaSuccess, "launch", 0, 0);
  const double unit = p.call.type == Storage::f32 ? 0 : p.call.type == Storage::f16 ? 0x1p-11 : 0x1p-8;
  for (int64_t s = 0; s < samples; ++s)
    for (int64_t i = 0; i < size; ++i) {
      const double want = number_of_randn(uint64_t(p.seed_and_offset[0]), offset, p.call.threads, s * size + i);
      check(std::fabs(got.get(s, i) - want) <= 4e-6 + unit * std::fabs(want), "drawn", got.get(s, i), want);
    }
}

// Quantiles are the CPU's but for what sums of another order make of the factor.
void check_adjustments(int64_t samples, int64_t size, int kind) {
  Problem p(samples, size, kind, true);
  for (const int k : {kSample, kOutput}) p.give(k);
  if (coin()) p.give(kUnconditional);
  AdjustmentCall call{};
  call.step = p.call;
  constexpr double kQuantiles[] = {0, 0.3, 0.95, 1}, kLargest[] = {1.25, HUGE_VAL};
  call.rescale = coin() ? 0.6 : 0, call.quantile = kQuantiles[below(4)], call.largest = kLargest[below(2)];
  std::vector<double> memory(samples * size), got(2 * samples, -1.0), want(2 * samples, -2.0);
  call.memory = memory.data(), call.out = want.data();
  baseline::adjustments(call, OneThread());
  call.out = got.data();
  check(adjustments(call, nullptr) == cudaSuccess, "launch", 0, 0);
  const double unit = storage_bytes(call.step.type) == 2 ? 1e-5 : 1e-13;
  for (int64_t i = 0; i < 2 * samples; ++i) {
    const bool same = got[i] == want[i] || (got[i] != got[i] && want[i] != want[i]);
    check(same || std::fabs(got[i] - want[i]) <= unit * std::fabs(want[i]), "adjustment", got[i], want[i]);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 120;
  using emulator::Order;
  for (const Order order : {Order::ascending, Order::descending, Order::shuffled}) {
    emulator::order = order;
    emulator::max_grid = order == Order::ascending ? int64_t(1) << 31 : 3;
    const int64_t sizes[] = {1, 2, 3, 7, 8, 9, 31, 32, 33, 64, 127, 128, 129, 255, 256, 384, 1000, 1024, 1032, 1999};
    for (int i = 0; i < rounds; ++i)
      for (int kind = 0; kind < 6; ++kind) {
        const int64_t samples = 1 + below(6), size = sizes[below(20)];
        check_step(samples, size, kind);
        check_transition(samples, size, kind);
        check_gradients(samples, size, kind);
        check_keyed_noise(samples, size, kind);
        check_drawn_noise(samples, size, kind);
        check_adjustments(samples, size, kind);
      }
    for (int kind = 0; kind < 6; ++kind) {
      check_step(1, 40000 + below(100), kind);
      check_transition(2, 20000 + below(100), kind);
      check_gradients(2, 20000 + below(100), kind);
    }
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
