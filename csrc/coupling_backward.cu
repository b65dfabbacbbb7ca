// The family's backward kernels.
#include "../kernels/cuda/coupling_spline.cuh"

namespace pyperf::coupling {

template int64_t spline_workspace_bytes<true>(const SplineElements&, const Spline<float>&);
template int64_t spline_workspace_bytes<true>(const SplineElements&, const Spline<double>&);
template cudaError_t spline<true>(const SplineElements&, const Spline<float>&, void*, cudaStream_t);
template cudaError_t spline<true>(const SplineElements&, const Spline<double>&, void*, cudaStream_t);

}  // namespace pyperf::coupling
