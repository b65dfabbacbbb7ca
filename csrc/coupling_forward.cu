// The family's forward kernels.
#include "../kernels/cuda/coupling_spline.cuh"

namespace pyperf::coupling {

template int64_t spline_workspace_bytes<false>(const SplineElements&, const Spline<float>&);
template int64_t spline_workspace_bytes<false>(const SplineElements&, const Spline<double>&);
template cudaError_t spline<false>(const SplineElements&, const Spline<float>&, void*, cudaStream_t);
template cudaError_t spline<false>(const SplineElements&, const Spline<double>&, void*, cudaStream_t);

}  // namespace pyperf::coupling
