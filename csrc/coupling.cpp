// The schemas of the family's splines and their CPU backend.
#include <cmath>
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/simd.h"
#include "coupling_spline.h"

#define PYPERF_SIMD_BODY "coupling_spline.h"  // the one in kernels/cpu
#include "../kernels/cpu/simd_levels.h"

namespace pyperf::coupling {
namespace {

struct Cpu {
  static constexpr bool kCopiesOthers = false;

  template <bool kBackward, class R>
  static void spline(const SplineElements& e, const Spline<R>& s, const Tensor&) {
    if (e.count == 0) {
      if (!kBackward && e.summed)
        std::fill_n(static_cast<char*>(e.sample_logdet), e.samples * storage_bytes(e.logdet_type), '\0');
      return;
    }
    const SampleUnits units(e.samples, e.sample_size);
    const bool sums = e.shared || (!kBackward && e.summed);
    const int64_t of_unit = e.shared ? 2 * s.bins + s.derivatives() : 1;
    std::vector<double> partials(sums && units.pieces > 1 ? units.count * of_unit : 0);
    PYPERF_AT_SIMD_LEVEL(spline<R, kBackward, TorchThreads>)(e, s, partials.data(), TorchThreads());
  }
};

}  // namespace
}  // namespace pyperf::coupling

// Parameters have the shape of x and one dimension more; of size 1 where elements share them, and then their gradients
// are sums. bound: [*x.shape], log-det dtype; scales the box of an element; with tails "mixed" negative where they are
// circular. mask: bool, [*x.shape]; where false, an element passes as it is. Packed parameters may be those of some
// channels of x, whose shape bound and mask then have: split is None, or a dimension, the first channel and a step.
// smallest: bin width, bin height, derivative. sample_dims: log-dets are summed over the dimensions behind; -1: not.
#define PYPERF_SPLINE_TENSORS \
  "Tensor x, Tensor widths, Tensor heights, Tensor derivatives, Tensor? bound, Tensor? mask, "
#define PYPERF_PACKED_TENSORS "Tensor x, Tensor params, Tensor? bound, Tensor? mask, SymInt bins, SymInt[]? split, "
#define PYPERF_SPLINE_STATICS                                                                        \
  "bool inverse, str tails, str parametrization, float[] box, float[] smallest, float logit_scale, " \
  "float curve, SymInt sample_dims, bool exact"
STABLE_TORCH_LIBRARY_FRAGMENT(pyperf_dl, m) {
  m.def("rational_quadratic_spline(" PYPERF_SPLINE_TENSORS PYPERF_SPLINE_STATICS ") -> (Tensor, Tensor)");
  m.def("rational_quadratic_spline_packed(" PYPERF_PACKED_TENSORS PYPERF_SPLINE_STATICS ") -> (Tensor, Tensor)");
  m.def(
      "rational_quadratic_spline_backward(Tensor grad_y, Tensor "
      "grad_logdet, " PYPERF_SPLINE_TENSORS PYPERF_SPLINE_STATICS ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "rational_quadratic_spline_packed_backward(Tensor grad_y, Tensor "
      "grad_logdet, " PYPERF_PACKED_TENSORS PYPERF_SPLINE_STATICS ") -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyperf_dl, CPU, m) { PYPERF_IMPLEMENT_SPLINES(m, pyperf::coupling::Cpu); }
