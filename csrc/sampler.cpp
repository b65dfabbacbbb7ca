// The schemas of samplers and their CPU backend.
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../kernels/common/sample_units.h"
#include "common/simd.h"
#include "sampler.h"

#define PYPERF_SIMD_BODY "sampler.h"  // the one in kernels/cpu
#include "../kernels/cpu/simd_levels.h"

namespace pyperf::sampler {
namespace {

struct OnCpu {
  static constexpr bool kDraws = false;
  static void noise(const StepCall& call, const Tensor&) {
    PYPERF_AT_SIMD_LEVEL(noise<TorchThreads>)(call, TorchThreads());
  }
  static void adjustments(const AdjustmentCall& call, const Tensor&) {
    PYPERF_AT_SIMD_LEVEL(adjustments<TorchThreads>)(call, TorchThreads());
  }
  static void step(const StepCall& call, const Tensor&) {
    std::vector<double> partials(call.log_prob ? call.samples * call.runs() : 0);
    PYPERF_AT_SIMD_LEVEL(step<TorchThreads>)(call, partials.data(), TorchThreads());
  }
  static void step_backward(const StepCall& call, const StepGradients& grads, const Tensor&) {
    PYPERF_AT_SIMD_LEVEL(step_backward<TorchThreads>)(call, grads, TorchThreads());
  }
};

}  // namespace
}  // namespace pyperf::sampler

// table: float64 [rows, columns], see kernels/math/sampler_call.h. step (int64), guidance (float64), key (int64),
// adjust (float64 [.., 2]: a factor of the output, a bound of the denoised sample): for all samples, or for each. None:
// row, guidance_scale. state: int64 [2], seed and offset of a generator on CUDA, to which `offset` is added. low, high:
// of the clip, infinite for none. Outputs that were not asked for are empty. A transition is a step with its
// log-probability, and on demand the score, the gradient of that with respect to the mean; with a target it is that of
// the target, and no new sample is made.
#define PYPERF_STEP_NUMBERS "Tensor table, Tensor? step, Tensor? guidance, Tensor? key, Tensor? state, "
#define PYPERF_STEP_STATICS "SymInt row, float guidance_scale, float low, float high, SymInt offset, "
STABLE_TORCH_LIBRARY_FRAGMENT(pyperf_dl, m) {
  m.def(
      "sampler_noise(Tensor like, Tensor? key, Tensor? state, SymInt draw, SymInt offset, SymInt sample_dims) -> "
      "Tensor");
  m.def(
      "sampler_adjustments(Tensor x, Tensor output, Tensor? unconditional, Tensor table, Tensor? step, "
      "Tensor? guidance, SymInt row, float guidance_scale, float rescale, float quantile, float largest, "
      "SymInt sample_dims) -> Tensor");
  m.def(
      "sampler_step(Tensor x, Tensor output, Tensor? unconditional, Tensor? variance, Tensor? h1, Tensor? h2, "
      "Tensor? h3, Tensor? last, Tensor? noise, " PYPERF_STEP_NUMBERS "Tensor? adjust, " PYPERF_STEP_STATICS
      "bool denoised, bool keeps, SymInt copies, SymInt sample_dims) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sampler_transition(Tensor x, Tensor output, Tensor? unconditional, Tensor? variance, Tensor? h1, Tensor? h2, "
      "Tensor? h3, Tensor? last, Tensor? noise, Tensor? target, " PYPERF_STEP_NUMBERS
      "Tensor? adjust, " PYPERF_STEP_STATICS
      "bool denoised, bool keeps, SymInt copies, bool score, SymInt sample_dims) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sampler_step_backward(Tensor grad_next, Tensor grad_denoised, Tensor grad_kept, Tensor grad_corrected, "
      "Tensor grad_model_input, Tensor? x, Tensor? output, Tensor? unconditional, Tensor? variance, "
      "Tensor? noise, Tensor? grad_log_prob, Tensor? score, " PYPERF_STEP_NUMBERS PYPERF_STEP_STATICS
      "bool guided, bool next, bool denoised, bool keeps, bool corrects, SymInt copies, SymInt wanted, SymInt "
      "sample_dims) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyperf_dl, CPU, m) { PYPERF_IMPLEMENT_SAMPLER(m, pyperf::sampler::OnCpu); }
