// Affine couplings on CUDA.
#include "../kernels/cuda/coupling_affine.cuh"
#include "common/cuda.h"
#include "coupling_affine.h"

namespace pyperf::coupling {
namespace {

struct AffineOnCuda {
  static constexpr bool kCopiesOthers = true;

  template <class R>
  static void forward(const AffineCall<kForwardOperands>& call, const Tensor& like) {
    const CudaCall current(like);
    const Workspace workspace(like, affine_workspace_bytes(call));
    require_launched("affine_coupling", affine_forward<R>(call, workspace.get(), current.stream));
  }
  template <class R>
  static void backward(const AffineCall<kBackwardOperands>& call, const Tensor& like) {
    const CudaCall current(like);
    require_launched("affine_coupling", affine_backward<R>(call, current.stream));
  }
};

}  // namespace
}  // namespace pyperf::coupling

STABLE_TORCH_LIBRARY_IMPL(pyperf_dl, CUDA, m) { PYPERF_IMPLEMENT_AFFINE_COUPLING(m, pyperf::coupling::AffineOnCuda); }
