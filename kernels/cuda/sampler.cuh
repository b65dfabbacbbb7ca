// One step of a sampler on a GPU, in one kernel. A thread has kStepVectors vectors of 16 bytes of neighbouring samples,
// a stride apart, so that it uses all four normals of every block of Philox that it makes, whoever's noise it is.
//
// float32 is computed in double, as on a CPU. An operand takes a conversion (16 a clock and multiprocessor of an H100,
// where FP64 itself has 64) and one or two operations for its four bytes, of which the memory brings some 15 a clock: a
// quarter of what the units can do. Where FP64 is 1/64 of FP32, a step takes once or twice the time of the memory.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "../math/sampler_call.h"
#include "common.cuh"
#include "elementary.cuh"
#include "sample_sums.cuh"

namespace pyperf {
#include "../math/normal.h"
#include "../math/sampler.h"
}  // namespace pyperf

namespace pyperf::sampler {

// ---- what a thread does ----

constexpr int kBlockLanes = 8, kStepBlock = 1 << kBlockLanes;
constexpr int kStepVectors = 4;  // as many as normals of a block of Philox
constexpr int64_t kKeyedStride = 32, kKeyedGroup = kStepVectors * kKeyedStride;  // elements, see normal.h
constexpr int64_t kFewVectors = 1 << 16;  // of so many, each has a thread of its own
constexpr int kFewestLanes = 3;

template <class T>
constexpr int kWidth = 16 / sizeof(T);

// What a thread moves in one access. Those of 16 bits stay in pairs, as each alone would take a register, and go from
// and to floats by instructions for which half.h takes several: the time of a step is that of the memory, if barely.
template <class S, int kWidth>
struct alignas(sizeof(S) * kWidth) Neighbours {
  static constexpr bool kPairs = sizeof(S) == 2;
  using Word = std::conditional_t<kPairs, uint32_t, S>;
  Word words[kWidth * sizeof(S) / sizeof(Word)];

  PYPERF_DEVICE S get(int i) const {
    if constexpr (kPairs)
      return {uint16_t(words[i / 2] >> i % 2 * 16)};
    else
      return words[i];
  }
  // In ascending order.
  PYPERF_DEVICE void put(int i, S s) {
    if constexpr (kPairs)
      words[i / 2] = i % 2 ? words[i / 2] | uint32_t(s.bits) << 16 : s.bits;
    else
      words[i] = s;
  }

  template <class R>
  PYPERF_DEVICE R value(int i) const {
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<S, Float16>) {
      float v;
      asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(get(i).bits));
      return R(v);
    }
#endif
    return loaded<R>(get(i));
  }
  // Rounded; NaN becomes any.
  template <class R>
  PYPERF_DEVICE void set(const R (&values)[kWidth]) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
      if constexpr (kPairs) {
        if (i % 2) continue;
        const float low = float(values[i]), high = float(values[i + 1]);
        if constexpr (std::is_same_v<S, Float16>)
          asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(words[i / 2]) : "f"(high), "f"(low));
        else
          asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words[i / 2]) : "f"(high), "f"(low));
        continue;
      }
#endif
      put(i, stored<S>(values[i]));
    }
  }
};

// T: of samples, O: of what the model makes and sees.
template <class T>
using Arithmetic = std::conditional_t<sizeof(T) == 2, float, double>;
template <class T>
using SampleVector = Neighbours<T, kWidth<T>>;
template <class T, class O>
using ModelVector = Neighbours<O, kWidth<T>>;

struct StepPlan {
  int64_t blocks;
  int64_t tiles;      // of a sample, each of 2^lanes threads
  int lanes;          // at least kFewestLanes
  bool split;         // a thread has one vector, not kStepVectors
  bool aligned;       // every whole vector lies for one access
  int64_t last_turn;  // of a generator: the number of its last four numbers a thread
};

// Vectors [from, to) at element `first` + vector * stride of a sample, or, of a generator, of all samples.
struct StepItem {
  int64_t sample, first, stride, limit;
  int from, to;
  // Counter of Philox for the first element: of its neighbours, `block` goes up with keys, `draw` with a generator.
  uint64_t block;
  int64_t draw;
};

// False where there is nothing to do.
template <int kWidth>
PYPERF_DEVICE bool find_item(const StepCall& call, const StepPlan& plan, int64_t block, StepItem& item) {
  if (call.draws) {
    const int64_t per_turn = call.threads / kWidth;
    const cuda::Quotient turn = cuda::divide(block * kStepBlock + threadIdx.x, per_turn);
    item.sample = 0, item.limit = call.samples * call.sample_size;
    item.first = turn.quotient * kStepVectors * call.threads + turn.remainder * kWidth, item.stride = call.threads;
    item.from = 0, item.to = kStepVectors;
    item.block = uint64_t(turn.quotient), item.draw = turn.remainder * kWidth;
    return turn.quotient <= plan.last_turn && item.first < item.limit;
  }
  const int64_t tile = (block << kBlockLanes | threadIdx.x) >> plan.lanes;
  const cuda::Quotient at = plan.tiles > 1 ? cuda::divide(tile, plan.tiles) : cuda::Quotient{tile, 0};
  const int64_t place = at.remainder << plan.lanes | (threadIdx.x & ((1 << plan.lanes) - 1));
  item.sample = at.quotient, item.limit = call.sample_size, item.stride = kKeyedStride;
  constexpr int kPerStride = kKeyedStride / kWidth;
  const int64_t run = place / kPerStride;  // of kKeyedStride neighbours that have a thread each kWidth
  const int64_t group = plan.split ? run / kStepVectors : run;
  item.from = plan.split ? int(run % kStepVectors) : 0, item.to = plan.split ? item.from + 1 : kStepVectors;
  const int64_t in_run = place % kPerStride * kWidth;
  item.first = group * kKeyedGroup + in_run;
  item.block = uint64_t(group * kKeyedStride + in_run), item.draw = 0;
  return item.sample < call.samples && item.first + item.from * item.stride < item.limit;
}

// ---- normals ----

// Those of PyTorch's generator on CUDA, which are cuRAND's: with its instructions, among them two that nvcc contracts.
PYPERF_DEVICE void generator_pair(uint32_t x, uint32_t y, float& first, float& second) {
  constexpr float kUnit = 2.3283064e-10f, kTurn = kUnit * 6.2831855f;  // 2^-32, and times 2 pi
  const float u = ::fmaf(float(x), kUnit, kUnit / 2), v = ::fmaf(float(y), kTurn, kTurn / 2);
  const float radius = ::sqrtf(-2.0f * ::logf(u));
  __sincosf(v, &first, &second);
  first = first * radius, second = second * radius;
}

// A thread's own, in shared memory: registers are short.
template <int kWidth>
struct Normals {
  float v[kStepVectors][kWidth][kStepBlock];

  PYPERF_DEVICE float& at(int vector, int i) { return v[vector][i][threadIdx.x]; }
};

// Samples of 16 bits get those of torch.randn in 16 bits.
template <class T>
PYPERF_DEVICE void make_normals(const StepCall& call, const StepItem& item, Normals<kWidth<T>>& normals) {
  using M = ScalarMachine<float>;
  uint64_t key, block = item.block;
  int64_t draw = item.draw;
  if (call.draws) {
    key = call.state ? uint64_t(call.state[0]) : call.seed;
    block += (call.offset + (call.state ? uint64_t(call.state[1]) : 0)) / kStepVectors;
  } else {
    key = uint64_t(call.key[item.sample % call.keys]), draw = call.row_of(item.sample);
  }
  const bool wanted[2] = {item.from < 2, item.to > 2 && item.first + 2 * item.stride < item.limit};
#pragma unroll 4
  for (int i = 0; i < kWidth<T>; ++i) {
    uint32_t words[4];
    math::words_of_block<M>(key, draw, block, words);
    call.draws ? void(++draw) : void(++block);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      if (!wanted[pair]) continue;
      float first, second;
      if (call.draws) {
        float drawn[2];
        generator_pair(words[2 * pair], words[2 * pair + 1], drawn[0], drawn[1]);
        Neighbours<T, 2> rounded;
        rounded.set(drawn);
        first = rounded.template value<float>(0), second = rounded.template value<float>(1);
      } else {
        math::normal_pair<M>(words[2 * pair], words[2 * pair + 1], first, second);
      }
      normals.at(2 * pair, i) = first, normals.at(2 * pair + 1, i) = second;
    }
  }
}

// ---- vectors ----

// Neighbours [from, to) of a vector that starts at an element, perhaps before the first.
struct VectorPlace {
  int64_t sample, element;
  int from, to;
  bool whole;  // one access
};

template <class S, int kWidth>
PYPERF_DEVICE void load_vector(const S* p, const VectorPlace& at, Neighbours<S, kWidth>& v) {
  if (at.whole) {
    v = *reinterpret_cast<const Neighbours<S, kWidth>*>(p);
    return;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) v.put(i, at.from <= i && i < at.to ? p[i] : S{});
}
template <class S, int kWidth>
PYPERF_DEVICE void store_vector(S* p, const VectorPlace& at, const Neighbours<S, kWidth>& v) {
  if (at.whole) {
    *reinterpret_cast<Neighbours<S, kWidth>*>(p) = v;
    return;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    if (at.from <= i && i < at.to) p[i] = v.get(i);
}

template <class S>
PYPERF_DEVICE S* place_in(const Elements& e, const VectorPlace& at) {
  return static_cast<S*>(e.data) + (at.sample * e.stride + at.element);
}
template <class S, int kWidth>
PYPERF_DEVICE void load_operand(const Elements& e, const VectorPlace& at, Neighbours<S, kWidth>& v) {
  if (e.data) load_vector(place_in<S>(e, at), at, v);
}
template <class S, int kWidth, class R>
PYPERF_DEVICE void store_operand(const Elements& e, const VectorPlace& at, const R (&values)[kWidth]) {
  if (!e.data) return;
  Neighbours<S, kWidth> v;
  v.set(values);
  store_vector(place_in<S>(e, at), at, v);
}

template <int kWidth, class Body>
PYPERF_DEVICE void each(const Body& body) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) body(i);
}

// v, from which nothing can be computed ahead of a loop: that would be the places of all operands, for which there are
// not enough registers.
PYPERF_DEVICE int64_t not_ahead(int64_t v) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(v));
#endif
  return v;
}

// visit(place, vector) for every vector of an item; of one that samples share, for the part of each.
template <int kWidth, class Visit>
PYPERF_DEVICE void visit_vectors(const StepCall& call, const StepPlan& plan, const StepItem& item, const Visit& visit) {
#pragma unroll 1
  for (int vector = item.from; vector < item.to; ++vector) {
    const int64_t first = item.first + vector * item.stride;
    if (first >= item.limit) break;
    VectorPlace at{not_ahead(item.sample), first, 0, first + kWidth <= item.limit ? kWidth : int(item.limit - first),
                   false};
    const int end = at.to;
    do {
      if (call.draws && call.samples > 1) {
        const cuda::Quotient sample = cuda::divide(first + at.from, call.sample_size);
        at.sample = sample.quotient, at.element = sample.remainder - at.from;
        const int64_t rest = call.sample_size - at.element;
        at.to = rest < end ? int(rest) : end;
      }
      at.whole = plan.aligned && at.to - at.from == kWidth;
      visit(at, vector);
      at.from = at.to;
    } while (at.from < end);
  }
}

// ---- a step ----

// Those of the sample of a tile; the first thread of a tile makes them. All threads of a block call this.
template <class R>
PYPERF_DEVICE const StepWeights<R>& weights_of(const StepCall& call, const StepPlan& plan, int64_t sample) {
  __shared__ StepWeights<R> shared[kStepBlock >> kFewestLanes];
  StepWeights<R>& of_tile = shared[threadIdx.x >> plan.lanes];
  __syncthreads();  // those of the last block are no longer read
  if ((threadIdx.x & ((1 << plan.lanes) - 1)) == 0 && sample < call.samples) of_tile = StepWeights<R>(call, sample);
  __syncthreads();
  return of_tile;
}

template <class O, int kWidth, class R>
PYPERF_DEVICE void store_model_input(const StepCall& call, const StepWeights<R>& w, const VectorPlace& at,
                                     const R (&next)[kWidth]) {
  if (!call.has(kModelInput)) return;
  Neighbours<O, kWidth> input;
  R scaled[kWidth];
  each<kWidth>([&](int i) { scaled[i] = next[i] * w.input; });
  input.set(scaled);
  O* p = static_cast<O*>(call.operand[kModelInput].data) + (call.model_input_at(at.sample, 0) + at.element);
#pragma unroll 1
  for (int64_t copy = 0; copy < call.copies; ++copy, p += call.group * call.sample_size) store_vector(p, at, input);
}

// Without history, correction, and noise that has to be read: few enough operands for four vectors of each at a time.
template <class R, class T, class O>
PYPERF_DEVICE void plain_step(const StepCall& call, const StepWeights<R>& w, const VectorPlace& at,
                              const SampleVector<T>& samples, const ModelVector<T, O>& output,
                              const ModelVector<T, O>& unconditional, Normals<kWidth<T>>& normals, int vector) {
  using M = ScalarMachine<R>;
  constexpr int W = kWidth<T>;
  R x[W], m[W], next[W];
  each<W>([&](int i) { x[i] = samples.template value<R>(i), m[i] = output.template value<R>(i); });
  if (call.has(kUnconditional))
    each<W>([&](int i) { m[i] = math::guided<M>(w, m[i], unconditional.template value<R>(i)); });
  each<W>([&](int i) { next[i] = m[i] * w.m; });
  if (w.d != R(0))
    each<W>([&](int i) { next[i] = M::fma(w.d, math::clipped<M>(w, math::unclipped<M>(w, x[i], m[i])), next[i]); });
  each<W>([&](int i) { next[i] = M::fma(w.x, x[i], next[i]); });
  if (call.makes_noise()) each<W>([&](int i) { next[i] = M::fma(w.z, R(normals.at(vector, i)), next[i]); });
  store_operand<T>(call.operand[kNext], at, next);
  store_model_input<O>(call, w, at, next);
}

inline bool is_plain(const StepCall& call) {
  bool plain = !call.adjust && !(call.makes_noise() && call.has(kVariance)) && !(call.draws && call.samples > 1);
  for (const int k : {kHistory1, kHistory2, kHistory3, kLast, kNoise, kDenoised, kKept, kCorrected})
    plain = plain && !call.has(k);
  return plain;
}

template <class T, class O>
__global__ void __launch_bounds__(kStepBlock, 2) plain_step_kernel(StepCall call, StepPlan plan) {
  using R = Arithmetic<T>;
  constexpr int W = kWidth<T>;
  __shared__ Normals<W> normals;
  for (int64_t block = blockIdx.x; block < plan.blocks; block += gridDim.x) {
    StepItem item;
    const bool any = find_item<W>(call, plan, block, item);
    SampleVector<T> x[kStepVectors];
    ModelVector<T, O> output[kStepVectors], unconditional[kStepVectors];
    VectorPlace at{item.sample, item.first, 0, W, true};
    const auto is_whole = [&](int k) {
      return any && plan.aligned && item.from <= k && k < item.to && item.first + k * item.stride + W <= item.limit;
    };
    each<kStepVectors>([&](int k) {
      if (!is_whole(k)) return;
      at.element = item.first + k * item.stride;
      load_operand(call.operand[kSample], at, x[k]), load_operand(call.operand[kOutput], at, output[k]);
      load_operand(call.operand[kUnconditional], at, unconditional[k]);
    });
    if (any && call.makes_noise()) make_normals<T>(call, item, normals);
    const StepWeights<R>& w = weights_of<R>(call, plan, item.sample);
    if (!any) continue;
    each<kStepVectors>([&](int k) {
      if (!is_whole(k)) return;
      at.element = item.first + k * item.stride;
      plain_step<R, T, O>(call, w, at, x[k], output[k], unconditional[k], normals, k);
    });
    visit_vectors<W>(call, plan, item, [&](const VectorPlace& at, int k) {
      if (at.whole) return;
      load_operand(call.operand[kSample], at, x[0]), load_operand(call.operand[kOutput], at, output[0]);
      load_operand(call.operand[kUnconditional], at, unconditional[0]);
      plain_step<R, T, O>(call, w, at, x[0], output[0], unconditional[0], normals, k);
    });
  }
}

// The sum of the log-densities of samples as they were rounded, but for what each element has whatever it is.
template <class R, class T, class O>
PYPERF_DEVICE double sum_densities(const StepCall& call, const StepWeights<R>& w, const VectorPlace& at,
                                   const R (&mean)[kWidth<T>], const R (&next)[kWidth<T>],
                                   const ModelVector<T, O>& variance) {
  using M = ScalarMachine<R>;
  constexpr int W = kWidth<T>;
  SampleVector<T> sample;
  if (call.target.data)
    load_operand(call.target, at, sample);
  else
    sample.set(next);
  R score[W];
  double sum = 0;
  each<W>([&](int i) {
    const R learned = call.has(kVariance) ? variance.template value<R>(i) : R(0);
    const R difference = sample.template value<R>(i) - mean[i];
    const R density = math::log_density<M>(w, difference, call.has(kVariance), learned, score[i]);
    sum += at.from <= i && i < at.to ? double(density) : 0.0;
  });
  store_operand<LogProb<T>>(call.score, at, score);
  return sum;
}

// Returns the sum of log-densities where it is a transition.
template <bool kTransition, class R, class T, class O>
PYPERF_DEVICE double full_step(const StepCall& call, const StepWeights<R>& w, const VectorPlace& at, bool made,
                               Normals<kWidth<T>>& normals, int vector) {
  using M = ScalarMachine<R>;
  constexpr int W = kWidth<T>;
  SampleVector<T> samples, h1, h2, h3, last, noise;
  ModelVector<T, O> output, unconditional, variance;
  load_operand(call.operand[kSample], at, samples), load_operand(call.operand[kOutput], at, output);
  load_operand(call.operand[kUnconditional], at, unconditional), load_operand(call.operand[kVariance], at, variance);
  load_operand(call.operand[kHistory1], at, h1), load_operand(call.operand[kHistory2], at, h2);
  load_operand(call.operand[kHistory3], at, h3), load_operand(call.operand[kLast], at, last);
  load_operand(call.operand[kNoise], at, noise);

  R x[W], m[W], d[W], result[W];
  each<W>([&](int i) { x[i] = samples.template value<R>(i), m[i] = output.template value<R>(i); });
  if (call.has(kUnconditional))
    each<W>([&](int i) { m[i] = math::guided<M>(w, m[i], unconditional.template value<R>(i)); });
  if (call.adjust) each<W>([&](int i) { m[i] = m[i] * w.factor; });
  if (call.clips() || call.has(kDenoised) || call.has(kKept) || call.has(kLast))
    each<W>([&](int i) { d[i] = math::clipped<M>(w, math::unclipped<M>(w, x[i], m[i])); });
  if (call.adjust) each<W>([&](int i) { d[i] = d[i] * w.shrink; });
  store_operand<T>(call.operand[kDenoised], at, d);
  if (call.has(kLast)) {
    each<W>([&](int i) { x[i] = M::fma(w.last_d, d[i], last.template value<R>(i) * w.last_x); });
    if (call.has(kHistory1)) each<W>([&](int i) { x[i] = M::fma(w.last_h1, h1.template value<R>(i), x[i]); });
    if (call.has(kHistory2)) each<W>([&](int i) { x[i] = M::fma(w.last_h2, h2.template value<R>(i), x[i]); });
  }
  store_operand<T>(call.operand[kCorrected], at, x);
  if (call.has(kKept)) {
    each<W>([&](int i) { result[i] = M::fma(w.keep_d, d[i], M::fma(w.keep_m, m[i], x[i] * w.keep_x)); });
    store_operand<T>(call.operand[kKept], at, result);
  }
  each<W>([&](int i) { result[i] = m[i] * w.m; });
  if (w.d != R(0)) each<W>([&](int i) { result[i] = M::fma(w.d, d[i], result[i]); });
  each<W>([&](int i) { result[i] = M::fma(w.x, x[i], result[i]); });
  if (call.has(kHistory1)) each<W>([&](int i) { result[i] = M::fma(w.h1, h1.template value<R>(i), result[i]); });
  if (call.has(kHistory2)) each<W>([&](int i) { result[i] = M::fma(w.h2, h2.template value<R>(i), result[i]); });
  if (call.has(kHistory3)) each<W>([&](int i) { result[i] = M::fma(w.h3, h3.template value<R>(i), result[i]); });
  R mean[W];
  if constexpr (kTransition) each<W>([&](int i) { mean[i] = result[i]; });
  if (made || call.has(kNoise))
    each<W>([&](int i) {
      const R of_noise = made ? R(normals.at(vector, i)) : noise.template value<R>(i);
      const R deviation = call.has(kVariance) ? math::deviation<M>(w, variance.template value<R>(i)) : w.z;
      result[i] = M::fma(deviation, of_noise, result[i]);
    });
  store_operand<T>(call.operand[kNext], at, result);
  store_model_input<O>(call, w, at, result);
  if constexpr (kTransition) return sum_densities<R, T, O>(call, w, at, mean, result, variance);
  return 0;
}

// visit(place, weights, vector) for every vector of every item, with its normals made before where `made`.
// kOwnWeights: where the numbers of a generator meet samples that differ.
template <bool kOwnWeights, class T, class Visit>
PYPERF_DEVICE void visit_items(const StepCall& call, const StepPlan& plan, bool made, Normals<kWidth<T>>& normals,
                               const Visit& visit) {
  using R = Arithmetic<T>;
  for (int64_t block = blockIdx.x; block < plan.blocks; block += gridDim.x) {
    StepItem item;
    const bool any = find_item<kWidth<T>>(call, plan, block, item);
    if (any && made) make_normals<T>(call, item, normals);
    if constexpr (kOwnWeights) {
      if (!any) continue;
      visit_vectors<kWidth<T>>(call, plan, item, [&](const VectorPlace& at, int vector) {
        const StepWeights<R> w(call, at.sample);
        visit(at, w, vector);
      });
    } else {
      const StepWeights<R>& w = weights_of<R>(call, plan, item.sample);
      if (any)
        visit_vectors<kWidth<T>>(call, plan, item, [&](const VectorPlace& at, int vector) { visit(at, w, vector); });
    }
  }
}

template <bool kOwnWeights, class T, class O>
__global__ void __launch_bounds__(kStepBlock, kOwnWeights ? 1 : 2) full_step_kernel(StepCall call, StepPlan plan) {
  using R = Arithmetic<T>;
  __shared__ Normals<kWidth<T>> normals;
  const bool made = call.makes_noise();
  visit_items<kOwnWeights, T>(call, plan, made, normals,
                              [&](const VectorPlace& at, const StepWeights<R>& w, int vector) {
                                full_step<false, R, T, O>(call, w, at, made, normals, vector);
                              });
}

// partials: [samples, plan.tiles]; null where a tile is a sample.
template <class T, class O>
__global__ void __launch_bounds__(kStepBlock, 2) transition_kernel(StepCall call, StepPlan plan, double* partials) {
  using R = Arithmetic<T>;
  __shared__ Normals<kWidth<T>> normals;
  __shared__ double sums[kStepBlock];
  const bool made = call.makes_noise();
  const int thread = int(threadIdx.x), place = thread & ((1 << plan.lanes) - 1);
  for (int64_t block = blockIdx.x; block < plan.blocks; block += gridDim.x) {
    StepItem item;
    const bool any = find_item<kWidth<T>>(call, plan, block, item);
    if (any && made) make_normals<T>(call, item, normals);
    const StepWeights<R>& w = weights_of<R>(call, plan, item.sample);
    double sum = 0;
    int64_t elements = 0;
    if (any)
      visit_vectors<kWidth<T>>(call, plan, item, [&](const VectorPlace& at, int vector) {
        sum += full_step<true, R, T, O>(call, w, at, made, normals, vector);
        elements += at.to - at.from;
      });
    sums[thread] = any ? sum + double(elements) * math::log_normalizer(call, item.sample) : 0.0;
    cuda::sum_group(sums + (thread - place), place, 1 << plan.lanes, true);
    if (place != 0 || item.sample >= call.samples) continue;
    if (partials)
      partials[(block << kBlockLanes | thread) >> plan.lanes] = sums[thread];
    else
      static_cast<LogProb<T>*>(call.log_prob)[item.sample] = LogProb<T>(sums[thread]);
  }
}

// ---- its gradients ----

template <class R, class T, class O>
PYPERF_DEVICE void step_gradients(const StepCall& call, const StepGradients& grads, const StepWeights<R>& w,
                                  const VectorPlace& at, bool made, Normals<kWidth<T>>& normals, int vector) {
  using M = ScalarMachine<R>;
  constexpr int W = kWidth<T>;
  const auto of = [&](int k) -> const Elements& { return grads.of_output[k - kNext]; };
  SampleVector<T> of_next, of_kept, of_corrected, of_denoised, samples, noise;
  Neighbours<LogProb<T>, W> score;
  ModelVector<T, O> of_input, output, unconditional, variance;
  load_operand(of(kNext), at, of_next), load_operand(of(kKept), at, of_kept);
  load_operand(of(kCorrected), at, of_corrected), load_operand(of(kDenoised), at, of_denoised);
  if (call.clips()) {
    load_operand(call.operand[kSample], at, samples), load_operand(call.operand[kOutput], at, output);
    load_operand(call.operand[kUnconditional], at, unconditional);
  }
  R next[W], kept[W], x[W], d[W], m[W], result[W], of_log_prob = R(0);
  each<W>([&](int i) { next[i] = kept[i] = R(0); });
  if (of(kNext).data) each<W>([&](int i) { next[i] = of_next.template value<R>(i); });
  if (of(kModelInput).data) {
    const O* p = static_cast<const O*>(of(kModelInput).data) + (call.model_input_at(at.sample, 0) + at.element);
    each<W>([&](int i) { result[i] = R(0); });
    for (int64_t copy = 0; copy < call.copies; ++copy, p += call.group * call.sample_size) {
      load_vector(p, at, of_input);
      each<W>([&](int i) { result[i] = result[i] + of_input.template value<R>(i); });
    }
    each<W>([&](int i) { next[i] = M::fma(w.input, result[i], next[i]); });
  }
  if (call.score.data) {
    load_operand(call.score, at, score);
    of_log_prob = R(static_cast<const LogProb<T>*>(grads.of_log_prob)[at.sample]);
  }
  if (grads.of_input[kNoise].data || grads.of_input[kVariance].data) {
    load_operand(call.operand[kVariance], at, variance), load_operand(call.operand[kNoise], at, noise);
    R deviation[W];
    each<W>([&](int i) {
      deviation[i] = call.has(kVariance) ? math::deviation<M>(w, variance.template value<R>(i)) : w.z;
      result[i] = next[i] * deviation[i];
    });
    store_operand<T>(grads.of_input[kNoise], at, result);
    each<W>([&](int i) { result[i] = R(0); });
    if (made || call.has(kNoise))
      each<W>([&](int i) {
        const R of_noise = made ? R(normals.at(vector, i)) : noise.template value<R>(i);
        result[i] = next[i] * of_noise * deviation[i];
      });
    if (call.score.data)
      each<W>([&](int i) {
        const R of_density = math::log_density_by_deviation<M>(score.template value<R>(i), deviation[i]);
        result[i] = M::fma(of_log_prob, of_density, result[i]);
      });
    each<W>([&](int i) { result[i] = result[i] * w.log_deviation_slope; });
    store_operand<O>(grads.of_input[kVariance], at, result);
  }
  // The log-probability takes the new sample as given, whatever noise made it.
  if (call.score.data) each<W>([&](int i) { next[i] = M::fma(of_log_prob, score.template value<R>(i), next[i]); });
  if (of(kKept).data) each<W>([&](int i) { kept[i] = of_kept.template value<R>(i); });
  each<W>([&](int i) {
    x[i] = M::fma(w.x, next[i], kept[i] * w.keep_x);
    d[i] = M::fma(w.d, next[i], kept[i] * w.keep_d);
  });
  if (of(kCorrected).data) each<W>([&](int i) { x[i] = x[i] + of_corrected.template value<R>(i); });
  if (of(kDenoised).data) each<W>([&](int i) { d[i] = d[i] + of_denoised.template value<R>(i); });
  if (call.corrects) each<W>([&](int i) { d[i] = M::fma(w.last_d, x[i], d[i]); });
  if (call.clips())
    each<W>([&](int i) {
      R m = output.template value<R>(i);
      if (call.guided) m = math::guided<M>(w, m, unconditional.template value<R>(i));
      const R value = math::unclipped<M>(w, samples.template value<R>(i), m);
      d[i] = M::at_least(value, w.low) && M::at_least(w.high, value) ? d[i] : R(0);
    });
  each<W>([&](int i) { m[i] = M::fma(w.m, next[i], M::fma(w.keep_m, kept[i], d[i] * w.q)); });

  if (grads.of_input[kSample].data) {
    each<W>([&](int i) { result[i] = call.corrects ? d[i] * w.p : d[i] * w.p + x[i]; });
    store_operand<T>(grads.of_input[kSample], at, result);
  }
  each<W>([&](int i) { result[i] = call.guided ? m[i] * w.guidance : m[i]; });
  store_operand<O>(grads.of_input[kOutput], at, result);
  if (call.guided && grads.of_input[kUnconditional].data) {
    each<W>([&](int i) { result[i] = m[i] - result[i]; });
    store_operand<O>(grads.of_input[kUnconditional], at, result);
  }
  const auto of_history = [&](int k, R of_next, R of_last) {
    if (!grads.of_input[k].data) return;
    each<W>([&](int i) { result[i] = M::fma(of_next, next[i], (call.corrects ? x[i] : R(0)) * of_last); });
    store_operand<T>(grads.of_input[k], at, result);
  };
  of_history(kHistory1, w.h1, w.last_h1), of_history(kHistory2, w.h2, w.last_h2);
  const auto of_product = [&](int k, const R(&v)[W], R weight) {
    if (!grads.of_input[k].data) return;
    each<W>([&](int i) { result[i] = v[i] * weight; });
    store_operand<T>(grads.of_input[k], at, result);
  };
  of_product(kHistory3, next, w.h3), of_product(kLast, x, w.last_x);
}

template <bool kOwnWeights, class T, class O>
__global__ void __launch_bounds__(kStepBlock, kOwnWeights ? 1 : 2)
    step_backward_kernel(StepCall call, StepGradients grads, StepPlan plan) {
  using R = Arithmetic<T>;
  __shared__ Normals<kWidth<T>> normals;
  const bool made = call.makes_noise() && grads.of_input[kVariance].data;
  visit_items<kOwnWeights, T>(call, plan, made, normals,
                              [&](const VectorPlace& at, const StepWeights<R>& w, int vector) {
                                step_gradients<R, T, O>(call, grads, w, at, made, normals, vector);
                              });
}

// ---- noise alone ----

template <class T>
__global__ void __launch_bounds__(kStepBlock, 2) noise_kernel(StepCall call, StepPlan plan) {
  constexpr int W = kWidth<T>;
  __shared__ Normals<W> normals;
  for (int64_t block = blockIdx.x; block < plan.blocks; block += gridDim.x) {
    StepItem item;
    if (!find_item<W>(call, plan, block, item)) continue;
    make_normals<T>(call, item, normals);
    visit_vectors<W>(call, plan, item, [&](const VectorPlace& at, int vector) {
      float of_vector[W];
#pragma unroll
      for (int i = 0; i < W; ++i) of_vector[i] = normals.at(vector, i);
      store_operand<T>(call.operand[kNext], at, of_vector);
    });
  }
}

// ---- launches ----

// Whether vectors of `width` lie where one access reaches them.
inline bool packs(const StepCall& call, const StepGradients* grads, int width) {
  const auto is_model = [](int k) { return k == kOutput || k == kUnconditional || k == kVariance || k == kModelInput; };
  const auto lies_by = [&](const Elements& e, Storage type, bool one) {
    return !e.data || (reinterpret_cast<uintptr_t>(e.data) % uintptr_t(width * storage_bytes(type)) == 0 &&
                       (one || e.stride % width == 0));
  };
  const bool one = call.samples == 1;
  const auto lies = [&](const Elements& e, int k) {
    const Storage type = is_model(k) ? call.output_type : call.type;
    return k == kModelInput ? lies_by({e.data, call.sample_size}, type, one && call.copies <= 1)
                            : lies_by(e, type, one);
  };
  bool all = !call.draws || call.samples == 1 || call.sample_size % width == 0;
  all = all && lies_by(call.target, call.type, one) && lies_by(call.score, call.log_prob_type(), one);
  for (int k = 0; k < kOperands; ++k) all = all && lies(call.operand[k], k);
  if (!grads) return all;
  for (int k = 0; k < kOutputs; ++k) all = all && lies(grads->of_output[k], kNext + k);
  for (int k = 0; k < kInputs; ++k) all = all && lies(grads->of_input[k], k);
  return all;
}

inline StepPlan plan_of(const StepCall& call, const StepGradients* grads, int64_t few) {
  const int width = 16 / storage_bytes(call.type);
  const auto pieces = [](int64_t n, int64_t of) { return (n + of - 1) / of; };
  StepPlan plan{};
  plan.aligned = packs(call, grads, width);
  if (call.draws) {
    const int64_t all = call.samples * call.sample_size, turns = pieces(all, kStepVectors * call.threads);
    plan.last_turn = turns - 1, plan.lanes = kBlockLanes;
    const int64_t in_last = std::min(call.threads, all - plan.last_turn * kStepVectors * call.threads);
    plan.blocks = pieces(plan.last_turn * (call.threads / width) + pieces(in_last, width), kStepBlock);
    return plan;
  }
  plan.split = call.samples * pieces(call.sample_size, width) <= few;
  const int64_t items =
      plan.split ? pieces(call.sample_size, width) : pieces(call.sample_size, kKeyedGroup) * (kKeyedStride / width);
  plan.lanes = kFewestLanes;
  while (plan.lanes < kBlockLanes && (int64_t(1) << plan.lanes) < items) ++plan.lanes;
  plan.tiles = pieces(items, int64_t(1) << plan.lanes);
  plan.blocks = pieces(call.samples * plan.tiles, kStepBlock >> plan.lanes);
  return plan;
}

// with(T(), O())
template <class With>
cudaError_t with_types(const StepCall& call, const With& with) {
  switch (call.type) {
    case Storage::f64: return with(double(), double());
    case Storage::f16: return with(Float16(), Float16());
    case Storage::bf16: return with(BFloat16(), BFloat16());
    case Storage::f32: break;
  }
  switch (call.output_type) {
    case Storage::f16: return with(float(), Float16());
    case Storage::bf16: return with(float(), BFloat16());
    default: return with(float(), float());
  }
}

// few: of so many vectors, each has a thread of its own. call.draws: not for float64, whose numbers are others.
inline cudaError_t step(const StepCall& call, cudaStream_t stream, int64_t few = kFewVectors) {
  const StepPlan plan = plan_of(call, nullptr, few);
  return with_types(call, [&](auto t, auto o) {
    using T = decltype(t);
    using O = decltype(o);
    auto kernel = is_plain(call) ? &plain_step_kernel<T, O> : &full_step_kernel<false, T, O>;
    if constexpr (sizeof(T) < 8)
      if (call.draws && call.samples > 1) kernel = &full_step_kernel<true, T, O>;
    return cuda::launch(kernel, plan.blocks, kStepBlock, 0, stream, call, plan);
  });
}

// Of doubles that a transition needs.
inline int64_t transition_partials(const StepCall& call, int64_t few = kFewVectors) {
  const StepPlan plan = plan_of(call, nullptr, few);
  return plan.tiles > 1 ? call.samples * plan.tiles : 0;
}

// A step with a log-probability: one launch where a sample is a tile of a block, else two.
inline cudaError_t transition(const StepCall& call, double* partials, cudaStream_t stream, int64_t few = kFewVectors) {
  const StepPlan plan = plan_of(call, nullptr, few);
  return with_types(call, [&](auto t, auto o) {
    using T = decltype(t);
    const bool whole = plan.tiles == 1;
    const cudaError_t error = cuda::launch(&transition_kernel<T, decltype(o)>, plan.blocks, kStepBlock, 0, stream, call,
                                           plan, whole ? nullptr : partials);
    if (whole || error != cudaSuccess) return error;
    return cuda::sum_partials<LogProb<T>>(partials, call.samples, plan.tiles, 1, call.log_prob, stream);
  });
}

inline cudaError_t step_backward(const StepCall& call, const StepGradients& grads, cudaStream_t stream,
                                 int64_t few = kFewVectors) {
  const StepPlan plan = plan_of(call, &grads, few);
  return with_types(call, [&](auto t, auto o) {
    using T = decltype(t);
    using O = decltype(o);
    auto kernel = &step_backward_kernel<false, T, O>;
    if constexpr (sizeof(T) < 8)
      if (call.draws && call.samples > 1) kernel = &step_backward_kernel<true, T, O>;
    return cuda::launch(kernel, plan.blocks, kStepBlock, 0, stream, call, grads, plan);
  });
}

inline cudaError_t noise(const StepCall& call, cudaStream_t stream, int64_t few = kFewVectors) {
  const StepPlan plan = plan_of(call, nullptr, few);
  return with_types(call, [&](auto t, auto) {
    return cuda::launch(&noise_kernel<decltype(t)>, plan.blocks, kStepBlock, 0, stream, call, plan);
  });
}

}  // namespace pyperf::sampler
