// One step of a sampler on a CPU: runs of neighbouring elements of one sample, a vector at a time. Stamped once for
// each SIMD level (simd_levels.h). Prelude: <algorithm>, that of machine.h, ../math/sampler_call.h,
// ../common/sample_units.h.
#include "elements.h"
#include "normals.h"

#include "../math/sampler.h"

// Operands of a run, T of samples and O of what the model makes and sees; null where there is none.
template <class R, class T, class O>
struct StepRun {
  const T *x, *h1, *h2, *h3, *last, *noise, *target;
  const O *output, *unconditional, *variance;
  const float* normals;  // noise that was made from keys
  T *next, *denoised, *kept, *corrected;
  O* model_input;
  R* densities;  // what log-probabilities are sums of
  sampler::LogProb<T>* score;
};
template <class R, class T, class O>
struct GradientRun {
  const T *grad_next, *grad_denoised, *grad_kept, *grad_corrected, *x, *noise;
  const O *output, *unconditional, *variance;
  const float* normals;
  const R* grad_model_input;  // summed over its copies
  const sampler::LogProb<T>* score;
  R grad_log_prob;
  T *grad_x, *grad_h1, *grad_h2, *grad_h3, *grad_last, *grad_noise;
  O *grad_output, *grad_unconditional, *grad_variance;
};

// ---- vectors ----

// So many vectors are treated at a time, as many as registers hold.
constexpr int kStepVectors = PYPERF_VECTOR_BYTES == 64 ? 4 : 2;

// Some vectors of neighbouring elements, treated alike.
template <class R>
struct StepBlock {
  using M = VectorMachine<R>;
  using V = typename M::V;
  static constexpr int L = M::kLanes, kElements = L * kStepVectors;
  V v[kStepVectors];

  template <class Of>
  static __attribute__((always_inline)) StepBlock made(const Of& of) {
    StepBlock b;
    for (int k = 0; k < kStepVectors; ++k) b.v[k] = of(k);
    return b;
  }
  template <class S>
  static __attribute__((always_inline)) StepBlock load(const S* p) {
    return made([&](int k) __attribute__((always_inline)) { return load_lanes<R, L>(p + k * L); });
  }
  template <class S>
  __attribute__((always_inline)) void store(S* p) const {
    for (int k = 0; k < kStepVectors; k += 2) store_two<L, R>(v[k], v[k + 1], p + k * L);
  }
  __attribute__((always_inline)) StepBlock times(R w) const {
    return made([&](int k) __attribute__((always_inline)) { return v[k] * w; });
  }
  __attribute__((always_inline)) StepBlock operator+(const StepBlock& b) const {
    return made([&](int k) __attribute__((always_inline)) { return v[k] + b.v[k]; });
  }
  __attribute__((always_inline)) StepBlock operator-(const StepBlock& b) const {
    return made([&](int k) __attribute__((always_inline)) { return v[k] - b.v[k]; });
  }
  __attribute__((always_inline)) StepBlock operator*(const StepBlock& b) const {
    return made([&](int k) __attribute__((always_inline)) { return v[k] * b.v[k]; });
  }
  // this + w b
  __attribute__((always_inline)) StepBlock plus(R w, const StepBlock& b) const {
    return made([&](int k) __attribute__((always_inline)) { return M::fma(M::of(w), b.v[k], v[k]); });
  }
};

// Without history, noise, correction, or a second output.
template <bool kGuided, bool kClipped, class R, class T, class O>
__attribute__((noinline)) void plain_step(const StepWeights<R>& weights, const StepRun<R, T, O>& run, int64_t n) {
  using M = VectorMachine<R>;
  using Block = StepBlock<R>;
  const StepRun<R, T, O> o = run;  // copies, which no store can change
  const StepWeights<R> w = weights;
  for (int64_t i = 0; i < n; i += Block::kElements) {
    const Block x = Block::load(o.x + i);
    Block m = Block::load(o.output + i);
    if constexpr (kGuided) {
      const Block u = Block::load(o.unconditional + i);
      m = Block::made([&](int k) __attribute__((always_inline)) { return math::guided<M>(w, m.v[k], u.v[k]); });
    }
    Block next = m.times(w.m);
    if constexpr (kClipped)
      next = next.plus(w.d, Block::made([&](int k) __attribute__((always_inline)) {
                         return math::clipped<M>(w, math::unclipped<M>(w, x.v[k], m.v[k]));
                       }));
    next.plus(w.x, x).store(o.next + i);
  }
}

// Of the samples as they were rounded.
template <class R, class T, class O>
__attribute__((always_inline)) inline void store_densities(const StepWeights<R>& w, const StepRun<R, T, O>& o,
                                                           int64_t i, const StepBlock<R>& mean) {
  using M = VectorMachine<R>;
  using Block = StepBlock<R>;
  const Block sample = Block::load((o.target ? o.target : o.next) + i);
  Block variance{}, score;
  if (o.variance) variance = Block::load(o.variance + i);
  Block::made([&](int k) __attribute__((always_inline)) {
    const auto difference = sample.v[k] - mean.v[k];
    return math::log_density<M>(w, difference, o.variance != nullptr, variance.v[k], score.v[k]);
  }).store(o.densities + i);
  if (o.score) score.store(o.score + i);
}

template <bool kClipped, class R, class T, class O>
__attribute__((noinline)) void full_step(const StepWeights<R>& weights, const StepRun<R, T, O>& run, int64_t n) {
  using M = VectorMachine<R>;
  using Block = StepBlock<R>;
  const StepRun<R, T, O> o = run;
  const StepWeights<R> w = weights;
  for (int64_t i = 0; i < n; i += Block::kElements) {
    Block x = Block::load(o.x + i), m = Block::load(o.output + i);
    if (o.unconditional) {
      const Block u = Block::load(o.unconditional + i);
      m = Block::made([&](int k) __attribute__((always_inline)) { return math::guided<M>(w, m.v[k], u.v[k]); });
    }
    if constexpr (kClipped) m = m.times(w.factor);
    const Block d = Block::made([&](int k) __attribute__((always_inline)) {
      const auto d = math::unclipped<M>(w, x.v[k], m.v[k]);
      if constexpr (kClipped) return math::clipped<M>(w, d) * w.shrink;
      return d;
    });
    if (o.denoised) d.store(o.denoised + i);
    if (o.last) {
      x = Block::load(o.last + i).times(w.last_x).plus(w.last_d, d);
      if (o.h1) x = x.plus(w.last_h1, Block::load(o.h1 + i));
      if (o.h2) x = x.plus(w.last_h2, Block::load(o.h2 + i));
    }
    if (o.corrected) x.store(o.corrected + i);
    if (o.kept) x.times(w.keep_x).plus(w.keep_m, m).plus(w.keep_d, d).store(o.kept + i);
    Block next = m.times(w.m);
    if (w.d != R(0)) next = next.plus(w.d, d);
    next = next.plus(w.x, x);
    if (o.h1) next = next.plus(w.h1, Block::load(o.h1 + i));
    if (o.h2) next = next.plus(w.h2, Block::load(o.h2 + i));
    if (o.h3) next = next.plus(w.h3, Block::load(o.h3 + i));
    const Block mean = next;
    if (o.noise || o.normals) {
      const Block noise = o.noise ? Block::load(o.noise + i) : Block::load(o.normals + i);
      if (o.variance) {
        const Block v = Block::load(o.variance + i);
        next = Block::made([&](int k) __attribute__((always_inline)) {
          return M::fma(math::deviation<M>(w, v.v[k]), noise.v[k], next.v[k]);
        });
      } else {
        next = next.plus(w.z, noise);
      }
    }
    if (o.next) next.store(o.next + i);
    if (o.model_input) next.times(w.input).store(o.model_input + i);
    if (o.densities) store_densities(w, o, i, mean);
  }
}

template <class R, class T, class O>
__attribute__((noinline)) void step_gradients(const StepWeights<R>& weights, bool guided, bool clips, bool corrects,
                                              const GradientRun<R, T, O>& run, int64_t n) {
  using M = VectorMachine<R>;
  using Block = StepBlock<R>;
  const GradientRun<R, T, O> o = run;
  const StepWeights<R> w = weights;
  for (int64_t i = 0; i < n; i += Block::kElements) {
    Block next{}, kept{};
    if (o.grad_next) next = Block::load(o.grad_next + i);
    if (o.grad_model_input) next = next.plus(w.input, Block::load(o.grad_model_input + i));
    const Block of_sample = next;
    if (o.score) next = next.plus(o.grad_log_prob, Block::load(o.score + i));
    if (o.grad_kept) kept = Block::load(o.grad_kept + i);
    Block x = kept.times(w.keep_x).plus(w.x, next);
    if (o.grad_corrected) x = x + Block::load(o.grad_corrected + i);
    Block d = kept.times(w.keep_d).plus(w.d, next);
    if (o.grad_denoised) d = d + Block::load(o.grad_denoised + i);
    if (corrects) d = d.plus(w.last_d, x);
    if (clips) {
      Block m = Block::load(o.output + i);
      if (guided) {
        const Block u = Block::load(o.unconditional + i);
        m = Block::made([&](int k) __attribute__((always_inline)) { return math::guided<M>(w, m.v[k], u.v[k]); });
      }
      const Block of_x = Block::load(o.x + i);
      d = Block::made([&](int k) __attribute__((always_inline)) {
        const auto of = math::unclipped<M>(w, of_x.v[k], m.v[k]);
        const auto within = M::at_least(of, M::of(w.low)) & M::at_least(M::of(w.high), of);
        return M::select(within, d.v[k], typename M::V{});
      });
    }
    const Block m = d.times(w.q).plus(w.keep_m, kept).plus(w.m, next);
    if (o.grad_x) (corrects ? d.times(w.p) : d.times(w.p) + x).store(o.grad_x + i);
    const Block conditional = guided ? m.times(w.guidance) : m;
    if (o.grad_output) conditional.store(o.grad_output + i);
    if (o.grad_unconditional) (m - conditional).store(o.grad_unconditional + i);
    const Block of_last = corrects ? x : Block{};
    if (o.grad_h1) of_last.times(w.last_h1).plus(w.h1, next).store(o.grad_h1 + i);
    if (o.grad_h2) of_last.times(w.last_h2).plus(w.h2, next).store(o.grad_h2 + i);
    if (o.grad_h3) next.times(w.h3).store(o.grad_h3 + i);
    if (o.grad_last) x.times(w.last_x).store(o.grad_last + i);
    if (!o.grad_noise && !o.grad_variance) continue;
    Block deviation = Block::made([&](int) __attribute__((always_inline)) { return M::of(w.z); });
    if (o.variance) {
      const Block v = Block::load(o.variance + i);
      deviation = Block::made([&](int k) __attribute__((always_inline)) { return math::deviation<M>(w, v.v[k]); });
    }
    if (o.grad_noise) (of_sample * deviation).store(o.grad_noise + i);
    if (!o.grad_variance) continue;
    Block of_variance{};
    if (o.noise) of_variance = of_sample * Block::load(o.noise + i) * deviation;
    if (o.normals) of_variance = of_sample * Block::load(o.normals + i) * deviation;
    if (o.score) {
      const Block score = Block::load(o.score + i);
      of_variance = of_variance.plus(o.grad_log_prob, Block::made([&](int k) __attribute__((always_inline)) {
                                       return math::log_density_by_deviation<M>(score.v[k], deviation.v[k]);
                                     }));
    }
    of_variance.times(w.log_deviation_slope).store(o.grad_variance + i);
  }
}

// ---- runs ----

// Whole vectors where the operands lie, and the rest through memory of its own: run(operands, n) for n whole vectors.
// `visit(operands, move)` calls move(pointer) for each pointer of a run.
template <int L, class Operands, class Run, class Visit>
void in_vectors(Operands o, int64_t n, const Run& run, const Visit& visit) {
  constexpr int kPointers = 24;
  const int64_t whole = n / L * L, rest = n - whole;
  if (whole) run(o, whole);
  if (!rest) return;
  alignas(64) char memory[kPointers][L * 8];
  int place = 0;
  Operands padded = o;
  visit(padded, [&](auto*& p) {
    using S = std::remove_const_t<std::remove_reference_t<decltype(*p)>>;
    if (!p) return;
    S* const own = reinterpret_cast<S*>(memory[place++]);
    memset(static_cast<void*>(own), 0, L * sizeof(S));
    if constexpr (std::is_const_v<std::remove_reference_t<decltype(*p)>>)
      memcpy(static_cast<void*>(own), p + whole, rest * sizeof(S));
    p = own;
  });
  run(padded, int64_t(L));
  place = 0;
  visit(o, [&](auto*& p) {
    using S = std::remove_const_t<std::remove_reference_t<decltype(*p)>>;
    if (!p) return;
    if constexpr (!std::is_const_v<std::remove_reference_t<decltype(*p)>>)
      memcpy(static_cast<void*>(p + whole), memory[place], rest * sizeof(S));
    ++place;
  });
}

template <class T>
PYPERF_HD T* at_element(const sampler::Elements& e, int64_t sample, int64_t element) {
  return e.data ? static_cast<T*>(e.data) + sample * e.stride + element : nullptr;
}

template <class R, class T, class O>
void step_run(const sampler::StepCall& call, const StepWeights<R>& w, int64_t sample, int64_t first, int64_t n,
              const float* normals, R* densities) {
  using namespace sampler;
  const auto of = [&](int k) { return at_element<T>(call.operand[k], sample, first); };
  const auto of_model = [&](int k) { return at_element<O>(call.operand[k], sample, first); };
  StepRun<R, T, O> o{};
  o.x = of(kSample), o.h1 = of(kHistory1), o.h2 = of(kHistory2), o.h3 = of(kHistory3), o.last = of(kLast);
  o.noise = of(kNoise), o.normals = normals;
  o.output = of_model(kOutput), o.unconditional = of_model(kUnconditional), o.variance = of_model(kVariance);
  o.next = of(kNext), o.denoised = of(kDenoised), o.kept = of(kKept), o.corrected = of(kCorrected);
  O* const model_input = static_cast<O*>(call.operand[kModelInput].data);
  if (model_input) o.model_input = model_input + call.model_input_at(sample, 0) + first;
  o.target = at_element<T>(call.target, sample, first), o.densities = densities;
  o.score = at_element<sampler::LogProb<T>>(call.score, sample, first);

  const bool plain = !o.h1 && !o.h2 && !o.h3 && !o.last && !o.noise && !o.normals && !o.denoised && !o.kept &&
                     !o.corrected && !o.model_input && !call.adjust && !densities;
  const auto pick = [&] {
    if (!plain) return call.clips() ? &full_step<true, R, T, O> : &full_step<false, R, T, O>;
    const bool clipped = w.d != R(0);
    if (o.unconditional) return clipped ? &plain_step<true, true, R, T, O> : &plain_step<true, false, R, T, O>;
    return clipped ? &plain_step<false, true, R, T, O> : &plain_step<false, false, R, T, O>;
  };
  const auto pass = pick();
  in_vectors<StepBlock<R>::kElements>(
      o, n, [&](const StepRun<R, T, O>& run, int64_t count) { pass(w, run, count); },
      [](StepRun<R, T, O>& r, const auto& move) {
        move(r.x), move(r.h1), move(r.h2), move(r.h3), move(r.last), move(r.noise), move(r.output);
        move(r.unconditional), move(r.variance), move(r.normals), move(r.next), move(r.denoised), move(r.kept);
        move(r.corrected), move(r.model_input), move(r.target), move(r.densities), move(r.score);
      });
  for (int64_t copy = 1; model_input && copy < call.copies; ++copy)
    memcpy(static_cast<void*>(model_input + call.model_input_at(sample, copy) + first), o.model_input, n * sizeof(O));
}

template <class R, class T, class O>
void gradient_run(const sampler::StepCall& call, const StepWeights<R>& w, const sampler::StepGradients& grads,
                  int64_t sample, int64_t first, int64_t n, const float* normals, R* sum) {
  using namespace sampler;
  using Run = GradientRun<R, T, O>;
  const auto of = [&](int k) { return at_element<T>(call.operand[k], sample, first); };
  const auto of_model = [&](int k) { return at_element<O>(call.operand[k], sample, first); };
  const auto of_output = [&](int k) { return at_element<T>(grads.of_output[k - kNext], sample, first); };
  const auto of_input = [&](int k) { return at_element<T>(grads.of_input[k], sample, first); };
  const auto of_model_input = [&](int k) { return at_element<O>(grads.of_input[k], sample, first); };
  Run o{};
  o.grad_next = of_output(kNext), o.grad_denoised = of_output(kDenoised), o.grad_kept = of_output(kKept);
  o.grad_corrected = of_output(kCorrected);
  o.x = of(kSample), o.noise = of(kNoise), o.normals = normals;
  o.output = of_model(kOutput), o.unconditional = of_model(kUnconditional), o.variance = of_model(kVariance);
  if (const O* const grad = static_cast<const O*>(grads.of_output[kModelInput - kNext].data)) {
    std::fill_n(sum, n, R(0));
    for (int64_t copy = 0; copy < call.copies; ++copy) {
      const O* const from = grad + call.model_input_at(sample, copy) + first;
      for (int64_t i = 0; i < n; ++i) sum[i] += loaded<R>(from[i]);
    }
    o.grad_model_input = sum;
  }
  o.grad_x = of_input(kSample), o.grad_h1 = of_input(kHistory1), o.grad_h2 = of_input(kHistory2);
  o.grad_h3 = of_input(kHistory3), o.grad_last = of_input(kLast), o.grad_noise = of_input(kNoise);
  o.grad_output = of_model_input(kOutput), o.grad_unconditional = of_model_input(kUnconditional);
  o.grad_variance = of_model_input(kVariance);
  o.score = at_element<sampler::LogProb<T>>(call.score, sample, first);
  if (o.score) o.grad_log_prob = R(static_cast<const sampler::LogProb<T>*>(grads.of_log_prob)[sample]);
  const bool clips = call.clips();
  in_vectors<StepBlock<R>::kElements>(
      o, n, [&](const Run& run, int64_t count) { step_gradients(w, call.guided, clips, call.corrects, run, count); },
      [](Run& r, const auto& move) {
        move(r.grad_next), move(r.grad_denoised), move(r.grad_kept), move(r.grad_corrected), move(r.x), move(r.noise);
        move(r.output), move(r.unconditional), move(r.variance), move(r.normals), move(r.grad_model_input);
        move(r.grad_x), move(r.grad_h1), move(r.grad_h2), move(r.grad_h3), move(r.grad_last), move(r.grad_noise);
        move(r.grad_output), move(r.grad_unconditional), move(r.grad_variance), move(r.score);
      });
}

// ---- calls ----

// visit(weights, sample, first element, elements, scratch) for every run.
template <class Weights, class Parallel, class Visit>
void in_runs(const sampler::StepCall& call, int64_t scratch_bytes, const Parallel& parallel, const Visit& visit) {
  const int64_t pieces = call.runs();
  parallel(call.samples * pieces, 4, scratch_bytes, [&](int64_t from, int64_t to, void* scratch) {
    int64_t sample = from / pieces, piece = from % pieces;
    Weights weights(call, sample);
    for (int64_t i = from; i < to; ++i, ++piece) {
      if (piece == pieces) weights = Weights(call, ++sample), piece = 0;
      const int64_t first = piece * sampler::kStepRun;
      visit(weights, sample, first, std::min(sampler::kStepRun, call.sample_size - first), static_cast<char*>(scratch));
    }
  });
}

// The noise of a run, made in `memory`; null where none comes from keys.
inline const float* normals_of(const sampler::StepCall& call, int64_t sample, int64_t first, int64_t n, float* memory) {
  if (!call.key) return nullptr;
  fill_normals(uint64_t(call.key[sample % call.keys]), call.row_of(sample), first, n, memory);
  return memory;
}

// with(R(), T(), O()): of arithmetic, samples, and what the model makes.
template <class With>
void with_step_types(const sampler::StepCall& call, const With& with) {
  switch (call.type) {
    case Storage::f64: return with(double(), double(), double());
    case Storage::f16: return with(float(), Float16(), Float16());
    case Storage::bf16: return with(float(), BFloat16(), BFloat16());
    case Storage::f32: break;
  }
  switch (call.output_type) {
    case Storage::f16: return with(double(), float(), Float16());
    case Storage::bf16: return with(double(), float(), BFloat16());
    default: return with(double(), float(), float());
  }
}

// partials: one for each run, where there is a log-probability.
template <class Parallel>
void step(const sampler::StepCall& call, double* partials, const Parallel& parallel) {
  with_step_types(call, [&](auto r, auto t, auto o) {
    using R = decltype(r);
    using T = decltype(t);
    using Weights = StepWeights<R>;
    const int64_t pieces = call.runs();
    in_runs<Weights>(call, sampler::kStepRun * (sizeof(R) + sizeof(float)), parallel,
                     [&](const Weights& w, int64_t sample, int64_t first, int64_t n, char* scratch) {
                       R* const densities = call.log_prob ? reinterpret_cast<R*>(scratch) : nullptr;
                       float* const memory = reinterpret_cast<float*>(scratch + sampler::kStepRun * sizeof(R));
                       const float* const normals = normals_of(call, sample, first, n, memory);
                       step_run<R, T, decltype(o)>(call, w, sample, first, n, normals, densities);
                       if (call.log_prob)
                         partials[sample * pieces + first / sampler::kStepRun] =
                             ordered_sum(densities, n) + double(n) * math::log_normalizer(call, sample);
                     });
    sampler::LogProb<T>* const sums = static_cast<sampler::LogProb<T>*>(call.log_prob);
    for (int64_t s = 0; sums && s < call.samples; ++s)
      sums[s] = sampler::LogProb<T>(ordered_sum(partials + s * pieces, pieces));
  });
}

template <class Parallel>
void step_backward(const sampler::StepCall& call, const sampler::StepGradients& grads, const Parallel& parallel) {
  with_step_types(call, [&](auto r, auto t, auto o) {
    using R = decltype(r);
    using Weights = StepWeights<R>;
    in_runs<Weights>(call, sampler::kStepRun * (sizeof(R) + sizeof(float)), parallel,
                     [&](const Weights& w, int64_t sample, int64_t first, int64_t n, char* scratch) {
                       R* const sum = reinterpret_cast<R*>(scratch);
                       float* const memory = reinterpret_cast<float*>(scratch + sampler::kStepRun * sizeof(R));
                       const float* const normals = normals_of(call, sample, first, n, memory);
                       gradient_run<R, decltype(t), decltype(o)>(call, w, grads, sample, first, n, normals, sum);
                     });
  });
}

template <class Parallel>
void noise(const sampler::StepCall& call, const Parallel& parallel) {
  struct NoWeights {
    NoWeights(const sampler::StepCall&, int64_t) {}
  };
  with_step_types(call, [&](auto, auto t, auto) {
    using T = decltype(t);
    in_runs<NoWeights>(call, sampler::kStepRun * sizeof(float), parallel,
                       [&](NoWeights, int64_t sample, int64_t first, int64_t n, char* scratch) {
                         const float* const normals =
                             normals_of(call, sample, first, n, reinterpret_cast<float*>(scratch));
                         T* const out = at_element<T>(call.operand[sampler::kNext], sample, first);
                         for (int64_t i = 0; i < n; ++i) out[i] = stored<T>(normals[i]);
                       });
  });
}

// ---- whole samples ----

// Mean and variance about a first guess of the mean, each lane on its own: the same sums at every SIMD level.
template <class R>
struct Spread {
  static constexpr int kLanes = 16;
  double about = 0, sum[kLanes] = {}, squares[kLanes] = {};

  void add(const R* v, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes)
      for (int lane = 0; lane < kLanes && i + lane < n; ++lane) {
        const double d = double(v[i + lane]) - about;
        sum[lane] += d, squares[lane] += d * d;
      }
  }
  // Times n - 1.
  double variance(int64_t n) const {
    double s = 0, q = 0;
    for (int lane = 0; lane < kLanes; ++lane) s += sum[lane], q += squares[lane];
    return q - s * s / double(n);
  }
};

// The guided output of elements first, ..., first + n - 1, and x.
template <class R, class T, class O>
void load_guided(const sampler::StepCall& call, const StepWeights<R>& w, int64_t sample, int64_t first, int64_t n,
                 R* conditional, R* guided) {
  using namespace sampler;
  const O* const output = at_element<O>(call.operand[kOutput], sample, first);
  const O* const unconditional = at_element<O>(call.operand[kUnconditional], sample, first);
  for (int64_t i = 0; i < n; ++i) conditional[i] = loaded<R>(output[i]);
  if (!unconditional) return void(std::copy_n(conditional, n, guided));
  using M = ScalarMachine<R>;
  for (int64_t i = 0; i < n; ++i) guided[i] = math::guided<M>(w, conditional[i], loaded<R>(unconditional[i]));
}

// Of values without a NaN, which it reorders; between neighbours in a line.
template <class R>
double quantile_of(R* values, int64_t n, double quantile) {
  const double place = quantile * double(n - 1);
  const int64_t below = int64_t(place);
  std::nth_element(values, values + below, values + n);
  const double low = double(values[below]);
  const double high = below + 1 < n ? double(*std::min_element(values + below + 1, values + n)) : low;
  return low + (high - low) * (place - double(below));
}

template <class R, class T, class O>
void adjust_sample(const sampler::AdjustmentCall& call, int64_t sample, R* conditional, R* guided) {
  using namespace sampler;
  const StepCall& step = call.step;
  const StepWeights<R> w(step, sample);
  const int64_t n = step.sample_size;
  double* const out = call.out + 2 * sample;
  out[0] = 1, out[1] = double(INFINITY);
  const auto in_pieces = [&](const auto& visit) {
    for (int64_t first = 0; first < n; first += sampler::kStepRun) {
      const int64_t count = std::min(sampler::kStepRun, n - first);
      load_guided<R, T, O>(step, w, sample, first, count, conditional, guided);
      visit(first, count);
    }
  };
  if (call.rescale != 0 && step.operand[kUnconditional].data) {
    Spread<R> of_conditional, of_guided;
    in_pieces([&](int64_t first, int64_t count) {
      if (first == 0) of_conditional.about = double(conditional[0]), of_guided.about = double(guided[0]);
      of_conditional.add(conditional, count), of_guided.add(guided, count);
    });
    const double ratio = std::sqrt(of_conditional.variance(n) / of_guided.variance(n));
    out[0] = n > 1 ? call.rescale * ratio + (1 - call.rescale) : double(NAN);
  }
  if (call.quantile == 0) return;
  R* const sizes = static_cast<R*>(call.memory) + sample * n;
  const T* const x = static_cast<const T*>(step.operand[kSample].data) + sample * step.operand[kSample].stride;
  const R factor = R(out[0]);
  bool ordered = true;
  in_pieces([&](int64_t first, int64_t count) {
    using M = ScalarMachine<R>;
    for (int64_t i = 0; i < count; ++i) {
      const R d = std::fabs(math::unclipped<M>(w, loaded<R>(x[first + i]), guided[i] * factor));
      sizes[first + i] = d;
      ordered &= d == d;
    }
  });
  out[1] = ordered ? std::min(std::max(quantile_of(sizes, n, call.quantile), 1.0), call.largest) : double(NAN);
}

template <class Parallel>
void adjustments(const sampler::AdjustmentCall& call, const Parallel& parallel) {
  with_step_types(call.step, [&](auto r, auto t, auto o) {
    using R = decltype(r);
    parallel(call.step.samples, 1, 2 * sampler::kStepRun * sizeof(R), [&](int64_t from, int64_t to, void* scratch) {
      R* const memory = static_cast<R*>(scratch);
      for (int64_t sample = from; sample < to; ++sample)
        adjust_sample<R, decltype(t), decltype(o)>(call, sample, memory, memory + sampler::kStepRun);
    });
  });
}
