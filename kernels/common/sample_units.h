// How the elements of a tensor are cut into units of work, so that log-dets can be summed per sample in an order that
// depends on neither threads nor vector widths: a unit is some whole samples, or a piece of a large one.
#pragma once

#include <algorithm>
#include <cstdint>

#include "platform.h"

namespace pyperf {

struct SampleUnits {
  static constexpr int64_t kElements = 1024;  // of a unit, at most: their log-dets stay in the L1 cache

  int64_t samples, sample_size;
  int64_t samples_per_unit;  // 1 where a sample is cut
  int64_t pieces;            // units of one sample
  int64_t count;             // units

  // Without sums a "sample" is all there is.
  SampleUnits(int64_t samples, int64_t sample_size) : samples(samples), sample_size(sample_size) {
    samples_per_unit = std::max<int64_t>(1, kElements / std::max<int64_t>(1, sample_size));
    pieces = std::max<int64_t>(1, (sample_size + kElements - 1) / kElements);
    count = pieces > 1 ? samples * pieces : (samples + samples_per_unit - 1) / samples_per_unit;
  }
  int64_t first_sample(int64_t unit) const { return pieces > 1 ? unit / pieces : unit * samples_per_unit; }
  int64_t begin(int64_t unit) const {
    return pieces > 1 ? unit / pieces * sample_size + unit % pieces * kElements : first_sample(unit) * sample_size;
  }
  int64_t end(int64_t unit) const {
    if (pieces > 1) return std::min(begin(unit) + kElements, (unit / pieces + 1) * sample_size);
    return std::min(first_sample(unit) + samples_per_unit, samples) * sample_size;
  }
};

// The sum of v[0 .. n - 1], in double, in one order.
template <class R>
PYPERF_HD double ordered_sum(const R* v, int64_t n) {
  constexpr int kLanes = 16;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += double(v[i + l]);
  for (int l = 0; i < n; ++i, ++l) lanes[l] += double(v[i]);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

}  // namespace pyperf
