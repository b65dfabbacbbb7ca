// The functions of kernels/math/elementary.h over an array, for elementary_cpu.cpp; stamped once for each SIMD level.
#include "../../kernels/cpu/machine.h"

template <class M>
PYPERF_HD typename M::V elementary_of(int function, typename M::V x) {
  typename M::V sigmoid;
  if (function == 0) return math::exp<M>(x);
  if (function == 1) return math::log<M>(x);
  if (function == 2) return math::log1p_of_fraction<M>(x);
  return math::softplus<M>(x, sigmoid);
}

template <class R>
void elementary_vectors(int function, const R* x, R* y, int64_t n) {
  using M = VectorMachine<R>;
  for (int64_t i = 0; i < n; i += M::kLanes) M::store(y + i, elementary_of<M>(function, M::load(x + i)));
}
