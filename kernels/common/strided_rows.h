// The rows of a tensor along one dimension: every combination of the other indices, for N operands of one shape.
#pragma once

#include <cstdint>

#include "platform.h"

namespace pyperf {

constexpr int kMaxRowDims = 8;

template <int N>
struct StridedRows {
  int64_t count;  // product of the sizes
  int dims;
  int64_t size[kMaxRowDims];  // innermost last
  int64_t stride[N][kMaxRowDims];

  // Element offsets of the row's first element, one for each operand.
  PYPERF_HD void offsets(int64_t row, int64_t (&out)[N]) const {
    for (int n = 0; n < N; ++n) out[n] = 0;
    for (int d = dims - 1; d >= 0 && row; --d) {
      const int64_t next = d ? row / size[d] : 0;  // the outermost index needs no division
      const int64_t index = row - next * size[d];
      for (int n = 0; n < N; ++n) out[n] += index * stride[n][d];
      row = next;
    }
  }
};

}  // namespace pyperf
