// The schemas of affine couplings and their CPU backend.
#include <cmath>
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/simd.h"
#include "coupling_affine.h"

#define PYPERF_SIMD_BODY "coupling_affine.h"  // the one in kernels/cpu
#include "../kernels/cpu/simd_levels.h"

namespace pyperf::coupling {
namespace {

struct AffineOnCpu {
  static constexpr bool kCopiesOthers = false;

  template <class R>
  static void forward(const AffineCall<kForwardOperands>& call, const Tensor&) {
    if (call.elements() == 0) {
      if (call.summed) std::fill_n(static_cast<R*>(call.data[kLogdet]), call.samples, R(0));
      return;
    }
    const SampleUnits units(call.samples, call.sample_size);
    std::vector<double> partials(call.summed && units.pieces > 1 ? units.count : 0);
    PYPERF_AT_SIMD_LEVEL(affine_forward<R, TorchThreads>)(call, partials.data(), TorchThreads());
  }
  template <class R>
  static void backward(const AffineCall<kBackwardOperands>& call, const Tensor&) {
    PYPERF_AT_SIMD_LEVEL(affine_backward<R, TorchThreads>)(call, TorchThreads());
  }
};

}  // namespace
}  // namespace pyperf::coupling

// clamp, min_scale, max_scale: 0 for none. sample_dims: log-dets are summed over the dimensions behind them; -1: not.
// Packed: params hold scale and shift, or the shift alone for the activation "none", in their last dimension; split is
// None, or the dimension of x of which some channels are transformed, the first of them, and how far they are apart.
#define PYPERF_AFFINE_STATICS \
  "bool inverse, str activation, float clamp, float min_scale, float max_scale, bool shift_first, "
#define PYPERF_AFFINE_PACKED_STATICS PYPERF_AFFINE_STATICS "bool shift_leads, SymInt[]? split, SymInt sample_dims"
STABLE_TORCH_LIBRARY_FRAGMENT(pyperf_dl, m) {
  m.def("affine_coupling(Tensor x, Tensor scale, Tensor shift, " PYPERF_AFFINE_STATICS
        "SymInt sample_dims) -> (Tensor, Tensor)");
  m.def("affine_coupling_packed(Tensor x, Tensor params, " PYPERF_AFFINE_PACKED_STATICS ") -> (Tensor, Tensor)");
  m.def(
      "affine_coupling_backward(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor scale, Tensor "
      "shift, " PYPERF_AFFINE_STATICS "SymInt sample_dims) -> (Tensor, Tensor, Tensor)");
  m.def(
      "affine_coupling_packed_backward(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor "
      "params, " PYPERF_AFFINE_PACKED_STATICS ") -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyperf_dl, CPU, m) { PYPERF_IMPLEMENT_AFFINE_COUPLING(m, pyperf::coupling::AffineOnCpu); }
