// Neighbours that a thread moves in one access.
#pragma once

#include "common.cuh"

namespace pyperf::cuda {

template <class S, int kWidth>
struct alignas(sizeof(S) * kWidth) Packed {
  S v[kWidth];
};

}  // namespace pyperf::cuda
