// Copies the channels that a coupling does not transform.
#pragma once

#include "../common/other_channels.h"
#include "common.cuh"

namespace pyperf::cuda {

constexpr int64_t kOthersAThread = 4;  // units that a thread copies where the others alone decide on the blocks

inline int64_t blocks_for_others(const OtherChannels& others, int threads) {
  return (others.count + threads * kOthersAThread - 1) / (threads * kOthersAThread);
}

struct alignas(16) SixteenBytes {
  uint64_t v[2];
};

template <class Unit>
PYPERF_DEVICE void copy_unit(const char* from, char* to) {
  *reinterpret_cast<Unit*>(to) = *reinterpret_cast<const Unit*>(from);
}

// The share of this thread.
PYPERF_DEVICE void copy_others(const OtherChannels& others) {
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < others.count; i += threads) {
    int64_t rest = i, from = 0, to = 0;
    for (int d = others.dims - 1; d >= 0; --d) {
      const Quotient next = d ? divide(rest, others.size[d]) : Quotient{0, rest};
      const int64_t at = d == others.channel ? others.transformed.other(next.remainder) : next.remainder;
      from += at * others.stride[0][d], to += at * others.stride[1][d];
      rest = next.quotient;
    }
    switch (others.unit) {
      case 2: copy_unit<uint16_t>(others.from + from, others.to + to); break;
      case 4: copy_unit<uint32_t>(others.from + from, others.to + to); break;
      case 8: copy_unit<uint64_t>(others.from + from, others.to + to); break;
      default: copy_unit<SixteenBytes>(others.from + from, others.to + to);
    }
  }
}

}  // namespace pyperf::cuda
