// What the kernels of affine couplings are asked to do. Built on the host, passed to kernels by value.
#pragma once

#include <cstdint>

#include "../common/other_channels.h"
#include "../common/storage.h"
#include "../common/strided_rows.h"

namespace pyperf::coupling {

enum class Activation : int { none, exp, sigmoid, softplus, tanh, atan, softclip, sigmoid_floor, softplus_floor };

// y = x * e + shift_sign * shift, or (x + shift_sign * shift) * e where the shift comes before;
// log e = scale_sign * log_scale(u), which is the log-det.
struct Affine {
  Activation activation;
  bool shift_before;
  double scale_sign, shift_sign;
  double clamp;                 // infinity where the activation has none
  double min_scale, max_scale;  // of sigmoid_floor and softplus_floor; infinity for no largest one
};

// Operands of a call; the one that decides the order in memory comes last.
enum AffineOperand { kX, kScale, kShift, kLogdet, kY, kForwardOperands };
enum AffineGradient {
  kGradY,
  kGradLogdet,
  kOfX,
  kOfScale,
  kOfShift,
  kGradScale,
  kGradShift,
  kGradX,
  kBackwardOperands
};

// Element e of operand k: rows.offsets(e / n)[k] + e % n * stride[k]. `sample_size` neighbouring elements are one
// sample; if summed, log-dets or their gradients are `samples` neighbours in memory.
template <int N>
struct AffineCall {
  Affine how;
  StridedRows<N> rows;
  int64_t n;
  int64_t stride[N];
  void* data[N];
  Storage type[N];
  int64_t samples, sample_size;
  bool summed;
  OtherChannels others;  // what a kernel on a GPU copies on its way

  int64_t elements() const { return rows.count * n; }
};

}  // namespace pyperf::coupling
