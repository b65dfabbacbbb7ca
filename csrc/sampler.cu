// Steps of samplers on CUDA.
#include "../kernels/cuda/sampler.cuh"
#include "../kernels/cuda/sampler_adjustments.cuh"
#include "common/cuda.h"
#include "sampler.h"

namespace pyperf::sampler {
namespace {

// How many threads draw the numbers of torch.randn: blocks of 256 that the device holds at a time, at most.
void set_threads(StepCall& call, const Tensor& like) {
  if (!call.draws) return;
  const int64_t count = call.samples * call.sample_size;
  require(call.type != Storage::f64, "sampler: a generator's numbers are not made here in float64");
  require(count * storage_bytes(call.type) <= INT32_MAX,
          "sampler: torch draws tensors of more than 2 GiB in pieces, which is not done here");
  int processors = 0, threads = 0;
  const int device = like.get_device_index();
  require_launched("sampler", cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  require_launched("sampler", cudaDeviceGetAttribute(&threads, cudaDevAttrMaxThreadsPerMultiProcessor, device));
  constexpr int64_t kBlock = 256;
  call.threads = kBlock * std::min((count + kBlock - 1) / kBlock, processors * (threads / kBlock));
}

struct OnCuda {
  static constexpr bool kDraws = true;
  static void adjustments(const AdjustmentCall& call, const Tensor& like) {
    const CudaCall current(like);
    require_launched("sampler_adjustments", sampler::adjustments(call, current.stream));
  }
  static void noise(StepCall& call, const Tensor& out) {
    const CudaCall current(out);
    set_threads(call, out);
    require_launched("sampler_noise", sampler::noise(call, current.stream));
  }
  static void step(StepCall& call, const Tensor& like) {
    const CudaCall current(like);
    if (call.log_prob) {
      const Tensor partials = contiguous_empty(like, {transition_partials(call)}, ScalarType::Double);
      return require_launched("sampler_transition",
                              transition(call, static_cast<double*>(partials.data_ptr()), current.stream));
    }
    set_threads(call, like);
    require_launched("sampler_step", sampler::step(call, current.stream));
  }
  static void step_backward(StepCall& call, const StepGradients& grads, const Tensor& like) {
    const CudaCall current(like);
    set_threads(call, like);
    require_launched("sampler_step", sampler::step_backward(call, grads, current.stream));
  }
};

}  // namespace
}  // namespace pyperf::sampler

STABLE_TORCH_LIBRARY_IMPL(pyperf_dl, CUDA, m) { PYPERF_IMPLEMENT_SAMPLER(m, pyperf::sampler::OnCuda); }
