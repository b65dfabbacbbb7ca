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

// Standard normal noise is multiplied with this.
template <class M>
PYPERF_HD Value<M> deviation(const StepWeights<typename M::R>& w, Value<M> variance) {
  return exp<M>(M::fma(M::of(w.log_deviation_slope), variance, M::of(w.log_deviation))) * w.z;
}

}  // namespace math
