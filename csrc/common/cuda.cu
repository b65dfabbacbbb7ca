// Whether the compiled kernels can run on the current GPU.
#include "cuda.h"

#include <torch/csrc/stable/library.h>

#include <string>

namespace pyperf {
namespace {

__global__ void probe() {}

// Empty where they can, else the reason.
std::string cuda_problem() {
  int device = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // not to be found by somebody else's check
  if (error == cudaErrorInsufficientDriver) return "the NVIDIA driver is older than CUDA 13, with which this was built";
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
    return "this build has no code for this GPU's architecture (PYPERF_CUDA_ARCHS)";
  return std::string("CUDA reports ") + cudaGetErrorString(error);
}

}  // namespace
}  // namespace pyperf

STABLE_TORCH_LIBRARY_FRAGMENT(pyperf_dl, m) { m.def("_cuda_problem() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(pyperf_dl, CompositeExplicitAutograd, m) {
  m.impl("_cuda_problem", TORCH_BOX(&pyperf::cuda_problem));
}
