// The channels of a tensor that a coupling does not transform, as a copy that a kernel makes on its way.
#pragma once

#include <algorithm>
#include <cstdint>

#include "platform.h"
#include "strided_rows.h"

namespace pyperf {

// Channels first, first + step, ... of a dimension, `count` of them, are transformed.
struct Progression {
  int64_t first, step, count;

  // The channel that is number i of the others.
  PYPERF_HD int64_t other(int64_t i) const {
    if (i < first) return i;
    const int64_t behind = i - first;
    if (behind >= (count - 1) * (step - 1)) return i + count;
    const int64_t gap = int64_t(uint32_t(behind) / uint32_t(step - 1));
    return first + gap * step + 1 + (behind - gap * (step - 1));
  }
};

struct OtherChannels {
  int64_t count;                   // units to copy; 0: none
  int unit;                        // bytes: an element, or some neighbours
  int dims, channel;               // the latter is the one with the channels
  int64_t size[kMaxRowDims];       // in units, innermost last
  int64_t stride[2][kMaxRowDims];  // bytes, of the source and of the result
  Progression transformed;
  const char* from;
  char* to;
};

// False where there are too many dimensions or channels. Channels are those of dimension `channel`, of which at least
// one is transformed.
inline bool plan_other_channels(const int64_t* sizes, int dims, int channel, const Progression& transformed,
                                const void* from, const int64_t* from_strides, void* to, const int64_t* to_strides,
                                int element_bytes, OtherChannels& plan) {
  plan = {};
  plan.unit = element_bytes;
  plan.from = static_cast<const char*>(from), plan.to = static_cast<char*>(to);
  plan.transformed = transformed;
  if (transformed.count == 1) plan.transformed.step = 1;
  if (sizes[channel] > INT32_MAX) return false;
  plan.count = 1;
  int order[64], kept = 0;
  for (int d = 0; d < dims; ++d) {
    const int64_t size = d == channel ? sizes[d] - transformed.count : sizes[d];
    plan.count *= size;
    if (d != channel && size == 1) continue;
    if (kept == 64) return false;
    order[kept++] = d;
  }
  if (plan.count == 0) return true;
  std::stable_sort(order, order + kept, [&](int a, int b) { return to_strides[a] > to_strides[b]; });
  bool joinable = false;  // the last dimension is not the one of the channels
  for (int i = 0; i < kept; ++i) {
    const int d = order[i];
    const int64_t stride[2] = {from_strides[d] * element_bytes, to_strides[d] * element_bytes};
    int last = plan.dims - 1;
    if (joinable && d != channel && plan.stride[0][last] == stride[0] * sizes[d] &&
        plan.stride[1][last] == stride[1] * sizes[d]) {
      plan.size[last] *= sizes[d];
    } else {
      if (plan.dims == kMaxRowDims) return false;
      last = plan.dims++;
      plan.size[last] = d == channel ? sizes[d] - transformed.count : sizes[d];
      if (d == channel) plan.channel = last;
    }
    plan.stride[0][last] = stride[0], plan.stride[1][last] = stride[1];
    joinable = d != channel;
  }
  // Neighbours together.
  const int last = plan.dims - 1;
  if (plan.stride[0][last] != element_bytes || plan.stride[1][last] != element_bytes) return true;
  if (plan.channel == last && plan.transformed.step != 1) return true;
  for (int unit = 16; unit > element_bytes; unit /= 2) {
    const int64_t each = unit / element_bytes;
    const auto misses = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % uintptr_t(unit) != 0; };
    bool fits = plan.size[last] % each == 0 && !misses(from) && !misses(to);
    if (plan.channel == last) fits = fits && plan.transformed.first % each == 0 && plan.transformed.count % each == 0;
    for (int d = 0; d < last; ++d) fits = fits && plan.stride[0][d] % unit == 0 && plan.stride[1][d] % unit == 0;
    if (!fits) continue;
    plan.unit = unit, plan.count /= each, plan.size[last] /= each;
    plan.stride[0][last] = plan.stride[1][last] = unit;
    if (plan.channel == last) plan.transformed.first /= each, plan.transformed.count /= each;
    break;
  }
  return true;
}

}  // namespace pyperf
