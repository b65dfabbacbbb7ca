// The family's CUDA launchers, compiled by two sources side by side: the kernels take longest to build.
#pragma once

#include <cuda_runtime_api.h>

#include "../kernels/math/coupling.h"

namespace pyperf::coupling {

// kernels/cuda/coupling_spline.cuh
template <bool kBackward, class R>
int64_t spline_workspace_bytes(const SplineElements& e, const Spline<R>& c);
template <bool kBackward, class R>
cudaError_t spline(const SplineElements& e, const Spline<R>& c, void* workspace, cudaStream_t stream);

}  // namespace pyperf::coupling
