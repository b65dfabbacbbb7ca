// The arithmetic of one step of a sampler for one value of a machine (elementary.h); stamped once for each SIMD level
// and once for CUDA. Prelude: that of elementary.h, sampler_call.h.

// The coefficients of one sample's step. A row that does not exist is NaN throughout.
template <class R>
struct StepWeights {
  R p, q, x, m, d, h1, h2, h3, z, keep_x, keep_m, keep_d, last_x, last_d, last_h1, last_h2, input;
  R log_deviation, log_deviation_slope;  // at v = 0, and by v
  R guidance, factor, low, high, shrink;

  StepWeights() = default;
  PYPERF_HD StepWeights(const sampler::StepCall& call, int64_t sample) {
    using namespace sampler;
    const int64_t row = call.row_of(sample);
    const bool exists = row >= 0 && row < call.rows;
    const double* const c = call.table + (exists ? row : 0) * kColumns;
    const auto at = [&](int column) { return exists ? c[column] : double(NAN); };
    p = R(at(kP)), q = R(at(kQ));
    // Without a clip, the denoised sample is a sum of x and m like the rest: one rounding less.
    const bool folds = !call.clips() && !call.corrects;
    const double of_d = folds ? at(kD) : 0.0;
    x = R(at(kX) + of_d * at(kP)), m = R(at(kM) + of_d * at(kQ)), d = folds ? R(0) : R(at(kD));
    h1 = R(at(kH1)), h2 = R(at(kH2)), h3 = R(at(kH3)), z = R(at(kZ));
    keep_x = R(at(kKeepX)), keep_m = R(at(kKeepM)), keep_d = R(at(kKeepD));
    last_x = R(at(kLastX)), last_d = R(at(kLastD)), last_h1 = R(at(kLastH1)), last_h2 = R(at(kLastH2));
    log_deviation = R(0.25 * (at(kLogLarge) + at(kLogSmall)));
    log_deviation_slope = R(0.25 * (at(kLogLarge) - at(kLogSmall)));
    input = R(at(kInput));
    guidance = R(call.guidance_of(sample)), low = R(call.low), high = R(call.high);
    factor = shrink = R(1);
    if (call.adjust) {
      const double* const of = call.adjust + 2 * (sample % call.adjusts);
      factor = R(of[0]);
      if (!(of[1] == __builtin_huge_val())) low = R(-of[1]), high = R(of[1]), shrink = R(1 / of[1]);
    }
  }
};

namespace math {

template <class M>
PYPERF_HD Value<M> guided(const StepWeights<typename M::R>& w, Value<M> conditional, Value<M> unconditional) {
  return M::fma(M::of(w.guidance), conditional - unconditional, unconditional);
}

template <class M>
PYPERF_HD Value<M> unclipped(const StepWeights<typename M::R>& w, Value<M> x, Value<M> m) {
  return M::fma(M::of(w.p), x, m * w.q);
}
template <class M>
PYPERF_HD Value<M> clipped(const StepWeights<typename M::R>& w, Value<M> d) {
  return clamp<M>(d, M::of(w.low), M::of(w.high));
}

// Standard normal noise is multiplied with exp of this, and z.
template <class M>
PYPERF_HD Value<M> log_deviation(const StepWeights<typename M::R>& w, Value<M> variance) {
  return M::fma(M::of(w.log_deviation_slope), variance, M::of(w.log_deviation));
}
template <class M>
PYPERF_HD Value<M> deviation(const StepWeights<typename M::R>& w, Value<M> variance) {
  return exp<M>(log_deviation<M>(w, variance)) * w.z;
}

// What log N(sample; mean, deviation^2) has for each element whatever the learned variance is.
PYPERF_HD double log_normalizer(const sampler::StepCall& call, int64_t sample) {
  const int64_t row = call.row_of(sample);
  if (row < 0 || row >= call.rows) return double(NAN);
  return -std::log(call.table[row * sampler::kColumns + sampler::kZ]) - 0.91893853320467274178;  // log(2 pi) / 2
}
// And the rest of it, and its gradient with respect to the mean.
template <class M>
PYPERF_HD Value<M> log_density(const StepWeights<typename M::R>& w, Value<M> difference, bool learned,
                               Value<M> variance, Value<M>& score) {
  using R = typename M::R;
  const Value<M> inverse = learned ? M::of(R(1)) / deviation<M>(w, variance) : M::of(R(1) / w.z);
  const Value<M> z = difference * inverse;
  score = z * inverse;
  const Value<M> density = z * z * R(-0.5);
  return learned ? density - log_deviation<M>(w, variance) : density;
}
// The gradient of both with respect to the learned variance, but for the slope.
template <class M>
PYPERF_HD Value<M> log_density_by_deviation(Value<M> score, Value<M> deviation) {
  const Value<M> z = score * deviation;
  return z * z - M::of(typename M::R(1));
}

}  // namespace math
