// What the kernels of flow couplings are asked to do. Built on the host, passed to kernels by value.
#pragma once

#include <cstdint>

#include "../common/other_channels.h"
#include "../common/storage.h"
#include "../common/strided_rows.h"

namespace pyperf::coupling {

enum class Tails : int { linear, circular, bounded, mixed };  // mixed: linear or circular, by element

// A rational-quadratic spline from [left, right] onto [bottom, top], in the precision R of the arithmetic. With
// `scaled` each element has a bound: its box is that times its bound; mixed tails are circular where the bound is
// negative.
template <class R>
struct Spline {
  int bins;
  Tails tails;
  bool inverse;
  bool exponential;  // zuko's parameters: soft-clipped logits, exponential slopes; else nflows': softplus slopes
  bool scaled;
  R left, right, bottom, top;
  R least_width, width_room;  // a bin: least + room * its share of the softmax
  R least_height, height_room;
  R least_slope, largest_slope;
  R logit_scale;
  R curve, inverse_curve;  // sharpness of the softplus, or where soft clipping bends

  PYPERF_HD int extra_derivatives() const { return tails == Tails::linear ? -1 : tails == Tails::bounded ? 1 : 0; }
  PYPERF_HD int derivatives() const { return bins + extra_derivatives(); }
};

// `inverse_curve` etc. from the arguments of the operator; box: left, right, bottom, top; least: width, height, slope.
template <class R>
Spline<R> make_spline(int bins, Tails tails, bool inverse, bool exponential, bool scaled, const double (&box)[4],
                      const double (&least)[3], double logit_scale, double curve) {
  Spline<R> s{};
  s.bins = bins;
  s.tails = tails;
  s.inverse = inverse;
  s.exponential = exponential;
  s.scaled = scaled;
  s.left = R(box[0]), s.right = R(box[1]), s.bottom = R(box[2]), s.top = R(box[3]);
  const double width = box[1] - box[0], height = box[3] - box[2];
  s.least_width = R(width * least[0]), s.width_room = R(width * (1 - least[0] * bins));
  s.least_height = R(height * least[1]), s.height_room = R(height * (1 - least[1] * bins));
  s.least_slope = R(least[2]);
  s.largest_slope = sizeof(R) == 4 ? R(1e18) : R(1e150);  // its square fits
  s.logit_scale = R(logit_scale);
  s.curve = R(curve), s.inverse_curve = R(1 / curve);
  return s;
}

// What one element has of its own, in the order of SplineElements' arrays. In a backward the log-det is the gradient of
// the log-det, and the result that of x.
enum SplineOperand {
  kInput,
  kWidths,
  kHeights,
  kDerivatives,
  kGradWidths,
  kGradHeights,
  kGradDerivatives,
  kGradOutput,
  kLogdet,
  kResult,
  kSplineOperands
};

// What elements have beside the operands. It is shared by many, so that it is walked apart from them, in the same
// order.
struct Aside {
  StridedRows<1> rows;
  int64_t n, stride;
  const void* data;  // null: none

  PYPERF_HD int64_t offset(int64_t i) const {
    int64_t row[1];
    rows.offsets(i / n, row);
    return row[0] + i % n * stride;
  }
};

// Element i: operand k is at data[k] + (rows.offsets(i / n)[k] + i % n * stride[k]) elements. Parameters j of it are
// apart by parameter_stride. Operands that a call does not have are null.
//
// A sample is a run of sample_size elements: those whose log-dets are summed, or those of one set of parameters, whose
// gradients are summed.
struct SplineElements {
  StridedRows<kSplineOperands> rows;
  int64_t n, count;
  int64_t stride[kSplineOperands];
  int64_t parameter_stride[kSplineOperands];
  void* data[kSplineOperands];
  Storage type, parameter_type, logdet_type;
  bool packed, grads_packed;  // heights follow widths, and derivatives heights
  bool summed;                // the log-det is one number for each sample, contiguous; else one of the operands
  int64_t samples, sample_size;
  void* sample_logdet;
  double* shared;        // [samples, parameters]: sums of a backward's gradients; null: each element has its own
  Aside bounds;          // log-det numbers
  Aside mask;            // bools: where false, the element passes as it is
  OtherChannels others;  // what a kernel on a GPU copies on its way
};

}  // namespace pyperf::coupling
