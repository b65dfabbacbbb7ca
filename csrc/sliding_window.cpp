// The family's schemas and its CPU backend.
#include "sliding_window.h"

#include "../kernels/cpu/sliding_window_winners.h"
#include "common/simd.h"

namespace pyperf {
using namespace sliding_window;
}
#define PYPERF_SIMD_BODY "sliding_window_chunks.h"  // the one in kernels/cpu
#include "../kernels/cpu/simd_levels.h"

namespace pyperf::sliding_window {

template <class Key>
void extrema_on_cpu(const Extrema<Key>& p);  // sliding_window_extrema.h

namespace {

// The functions of the SIMD level in use.
struct Chunks {
  template <class A, class T, class Out, class Offset>
  SumChunk<A, T, Out, Offset> sum_chunk() const {
    return PYPERF_AT_SIMD_LEVEL(sum_chunk<A, T, Out, Offset>);
  }
  template <class Bits, class Offset>
  auto gather_stretch() const {
    return PYPERF_AT_SIMD_LEVEL(gather_stretch<Bits, Offset>);
  }
  template <class Offset>
  auto index_stretch() const {
    return PYPERF_AT_SIMD_LEVEL(index_stretch<Offset>);
  }
};

struct Cpu {
  template <class Key>
  static void extrema(const Extrema<Key>& p, const Tensor&) {
    extrema_on_cpu(p);
  }
  template <class T>
  static void winner_sums(const WinnerSums<T>& p, const Tensor&) {
    sliding_window::winner_sums(p, TorchThreads(), Chunks());
  }
  template <class Bits>
  static void winner_gather(const WinnerGather<Bits>& p, const Tensor&) {
    sliding_window::winner_gather(p, TorchThreads(), Chunks());
  }
  static void winner_index(const WinnerIndex& p, const Tensor&) {
    sliding_window::winner_index(p, TorchThreads(), Chunks());
  }
};

}  // namespace
}  // namespace pyperf::sliding_window

// `last`: the last of equal elements wins. The forms without offsets take it for their derivatives.
STABLE_TORCH_LIBRARY_FRAGMENT(pyperf_dl, m) {
  m.def(
      "sliding_window_extremum(Tensor x, int dim, SymInt window, SymInt stride, SymInt dilation, SymInt left, "
      "SymInt out_length, str mode, bool minimum, bool ignore_nan, bool last) -> Tensor");
  m.def(
      "sliding_window_extremum_offsets(Tensor x, int dim, SymInt window, SymInt stride, SymInt dilation, SymInt left, "
      "SymInt out_length, str mode, bool minimum, bool ignore_nan, bool last) -> (Tensor, Tensor)");
  m.def(
      "sliding_window_minmax(Tensor x, int dim, SymInt window, SymInt stride, SymInt dilation, SymInt left, "
      "SymInt out_length, str mode, bool ignore_nan, bool last) -> (Tensor, Tensor)");
  m.def(
      "sliding_window_minmax_offsets(Tensor x, int dim, SymInt window, SymInt stride, SymInt dilation, SymInt left, "
      "SymInt out_length, str mode, bool ignore_nan, bool last) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sliding_window_backward(Tensor grad_y, Tensor offsets, int dim, SymInt length, SymInt window, SymInt stride, "
      "SymInt dilation, SymInt left, str mode) -> Tensor");
  m.def(
      "sliding_window_gather(Tensor values, Tensor offsets, int dim, SymInt window, SymInt stride, SymInt dilation, "
      "SymInt left, str mode) -> Tensor");
  m.def(
      "sliding_window_index(Tensor offsets, int dim, SymInt length, SymInt window, SymInt stride, SymInt dilation, "
      "SymInt left, str mode) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyperf_dl, CPU, m) { PYPERF_IMPLEMENT_SLIDING_WINDOW(m, pyperf::sliding_window::Cpu); }
