// The family's CUDA backend.
#include "../kernels/cuda/sliding_window.cuh"
#include "common/cuda.h"
#include "sliding_window.h"

namespace pyperf::sliding_window {
namespace {

struct Cuda {
  template <class Key>
  static void extrema(const Extrema<Key>& p, const Tensor& like) {
    const CudaCall call(like);
    const Workspace workspace(like, extrema_workspace_bytes(p));
    require_launched("sliding_window", sliding_window::extrema(p, workspace.get(), call.stream));
  }
  template <class T>
  static void winner_sums(const WinnerSums<T>& p, const Tensor& like) {
    const CudaCall call(like);
    const Workspace workspace(like, winner_sums_workspace_bytes(p));
    require_launched("sliding_window", sliding_window::winner_sums(p, workspace.get(), call.stream));
  }
  template <class Bits>
  static void winner_gather(const WinnerGather<Bits>& p, const Tensor& like) {
    const CudaCall call(like);
    require_launched("sliding_window", sliding_window::winner_gather(p, call.stream));
  }
  static void winner_index(const WinnerIndex& p, const Tensor& like) {
    const CudaCall call(like);
    require_launched("sliding_window", sliding_window::winner_index(p, call.stream));
  }
};

}  // namespace
}  // namespace pyperf::sliding_window

STABLE_TORCH_LIBRARY_IMPL(pyperf_dl, CUDA, m) { PYPERF_IMPLEMENT_SLIDING_WINDOW(m, pyperf::sliding_window::Cuda); }
