// What the CUDA backends share on the host: the device and stream of a call, its workspace, its errors.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "tensor.h"

// Null under a torch without CUDA, which has no CUDA tensors to call us with.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace pyperf {

inline void require_launched(const char* family, cudaError_t error) {
  if (error == cudaSuccess) return;
  require(
      error != cudaErrorInsufficientDriver, family,
      ": the NVIDIA driver of this machine is older than CUDA 13, with which pyperf_dl was built; update the driver, "
      "or use pyperf_dl.backend(\"triton\")");
  require(
      error != cudaErrorNoKernelImageForDevice, family,
      ": this build of pyperf_dl has no code for this GPU; build it with PYPERF_CUDA_ARCHS set to its architecture, "
      "or use pyperf_dl.backend(\"triton\")");
  require(false, family, ": CUDA reports ", cudaGetErrorString(error));
}

// Makes the tensor's device current for its lifetime; `stream` is torch's current one there.
class CudaCall {
 public:
  explicit CudaCall(const Tensor& like) : guard_(like.get_device_index()) {
    require(aoti_torch_get_current_cuda_stream != nullptr, "pyperf_dl: a CUDA tensor, but torch offers no CUDA stream");
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

  cudaStream_t stream = nullptr;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// Memory that torch may hand out again once the stream has passed the work launched before its destruction.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t bytes) {
    if (bytes > 0) memory_ = empty(like, {bytes}, {0}, ScalarType::Byte);
  }
  void* get() const { return memory_.defined() ? memory_.data_ptr() : nullptr; }

 private:
  Tensor memory_;
};

}  // namespace pyperf
