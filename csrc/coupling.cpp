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
  template <bool kBackward, class R>
  static void spline(const SplineElements& e, const Spline<R>& s, const Tensor&) {
    if (e.count == 0) {
      if (!kBackward && e.summed) std::memset(e.sample_logdet, 0, size_t(e.samples * storage_bytes(e.logdet_type)));
      return;
    }
    const SampleUnits units(e.samples, e.sample_size);
    std::vector<double> partials(!kBackward && e.summed && units.pieces > 1 ? units.count : 0);
    PYPERF_AT_SIMD_LEVEL(spline<R, kBackward, TorchThreads>)(e, s, partials.data(), TorchThreads());
  }
};

}  // namespace
}  // namespace pyperf::coupling

// bound: [*x.shape], log-det dtype; scales the box of an element; with tails "mixed" negative where they are circular.
// smallest: bin width, bin height, derivative. sample_dims: log-dets are summed over the dimensions behind; -1: not.
#define PYPERF_SPLINE_STATICS                                                                        \
  "bool inverse, str tails, str parametrization, float[] box, float[] smallest, float logit_scale, " \
  "float curve, SymInt sample_dims, bool exact"
STABLE_TORCH_LIBRARY_FRAGMENT(pyperf_dl, m) {
  m.def(
      "rational_quadratic_spline(Tensor x, Tensor widths, Tensor heights, Tensor derivatives, Tensor? "
      "bound, " PYPERF_SPLINE_STATICS ") -> (Tensor, Tensor)");
  m.def("rational_quadratic_spline_packed(Tensor x, Tensor params, Tensor? bound, SymInt bins, " PYPERF_SPLINE_STATICS
        ") -> (Tensor, Tensor)");
  m.def(
      "rational_quadratic_spline_backward(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor widths, Tensor heights, "
      "Tensor derivatives, Tensor? bound, " PYPERF_SPLINE_STATICS ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "rational_quadratic_spline_packed_backward(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor params, Tensor? "
      "bound, SymInt bins, " PYPERF_SPLINE_STATICS ") -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyperf_dl, CPU, m) { PYPERF_IMPLEMENT_SPLINES(m, pyperf::coupling::Cpu); }
