// The family's CUDA backend.
#include "common/cuda.h"
#include "coupling_cuda.h"
#include "coupling_spline.h"

namespace pyperf::coupling {
namespace {

struct Cuda {
  static constexpr bool kCopiesOthers = true;

  template <bool kBackward, class R>
  static void spline(const SplineElements& e, const Spline<R>& c, const Tensor& like) {
    const CudaCall call(like);
    const Workspace workspace(like, spline_workspace_bytes<kBackward>(e, c));
    require_launched("coupling", coupling::spline<kBackward>(e, c, workspace.get(), call.stream));
  }
};

}  // namespace
}  // namespace pyperf::coupling

STABLE_TORCH_LIBRARY_IMPL(pyperf_dl, CUDA, m) { PYPERF_IMPLEMENT_SPLINES(m, pyperf::coupling::Cuda); }
