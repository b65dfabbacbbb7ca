// Geometry of sliding windows along one dimension, shared by the CPU and CUDA kernels.
#pragma once

#include <cstdint>

#include "../common/platform.h"
#include "../common/strided_rows.h"
#include "ordered_key.h"

namespace pyperf::sliding_window {

// What a tap outside [0, length) reads. The names follow scipy.ndimage.
enum class Edge : int { constant = 0, reflect = 1, nearest = 2, wrap = 3, mirror = 4 };

// Output i looks at the positions start(i) + t * dilation for the taps t in [0, window).
// A position is relative to the first element of the row; padding lies below 0 and from `length` on.
struct Windows {
  int64_t length;
  int64_t out_length;
  int64_t window;
  int64_t stride;
  int64_t dilation;
  int64_t left;
  Edge edge;

  PYPERF_HD int64_t start(int64_t i) const { return i * stride - left; }
  PYPERF_HD int64_t extent() const { return (window - 1) * dilation + 1; }
  // The first position of the padded row is -left; this is its length.
  PYPERF_HD int64_t padded_length() const { return out_length ? (out_length - 1) * stride + extent() : 0; }

  // Index of the element that a position reads, -1 where it reads none.
  PYPERF_HD int64_t source(int64_t position) const {
    if (position >= 0 && position < length) return position;
    if (edge == Edge::constant || length == 0) return -1;
    if (edge == Edge::nearest) return position < 0 ? 0 : length - 1;
    if (edge == Edge::mirror && length == 1) return 0;
    const int64_t period = edge == Edge::wrap ? length : edge == Edge::reflect ? 2 * length : 2 * length - 2;
    int64_t r = position % period;
    if (r < 0) r += period;
    if (r < length) return r;
    return edge == Edge::reflect ? period - 1 - r : period - r;
  }
};

// Gradients of equal winners are added in one fixed order on every backend: runs of outputs are cut at multiples of
// kLeaf and kChunk (output index within its phase), each piece is summed from left to right, then the leaves of a
// chunk, then the chunks.
constexpr int64_t kLeaf = 16;
constexpr int64_t kChunk = 256;

// The same windows without the taps that lie outside the row at every output, so that a window longer than the row
// costs no more than the row. first_tap: how many were cut at the front.
inline Windows without_idle_taps(Windows w, int64_t& first_tap) {
  first_tap = 0;
  if (w.edge != Edge::constant || w.out_length == 0) return w;
  const int64_t last_start = w.start(w.out_length - 1);
  if (last_start < 0) first_tap = (-last_start + w.dilation - 1) / w.dilation;
  if (first_tap > w.window - 1) first_tap = w.window - 1;
  w.left -= first_tap * w.dilation;
  w.window -= first_tap;
  const int64_t ahead = w.length - w.start(0);  // from the first start to the end of the row
  const int64_t useful = ahead > 0 ? (ahead + w.dilation - 1) / w.dilation : 1;
  if (w.window > useful) w.window = useful;
  return w;
}

// Outputs whose windows share their elements: with dilation the row falls apart into interleaved phases.
// Phase a holds the outputs a, a + count, a + 2 count, ...; its k-th dense window starts at position
// start(a) + k * dilation, and output c of the phase is dense window c * step.
struct Phases {
  int64_t count;
  int64_t step;

  PYPERF_HD static int64_t gcd(int64_t a, int64_t b) {
    while (b) {
      const int64_t r = a % b;
      a = b;
      b = r;
    }
    return a;
  }
  PYPERF_HD explicit Phases(const Windows& w) {
    const int64_t g = gcd(w.stride, w.dilation);
    count = w.dilation / g;
    step = w.stride / g;
  }
  PYPERF_HD int64_t outputs(const Windows& w, int64_t phase) const {
    return phase < w.out_length ? (w.out_length - phase + count - 1) / count : 0;
  }
};

// Offsets are taps counted from the start of the window; the narrowest type that holds them, so that the state saved
// for the backward is small. The pattern of all ones means "no winner".
enum class OffsetType : int { none = 0, u8 = 1, i16 = 2, i32 = 4 };

PYPERF_HD OffsetType offset_type(int64_t window) {
  return window <= 255 ? OffsetType::u8 : window <= 32767 ? OffsetType::i16 : OffsetType::i32;
}

// ---- what a kernel is asked to do; pointers are to the first element, strides count elements ----
//
// `lanes` adjacent rows (element stride 1 in every operand) are taken together where the window dimension is not the
// dense one; the rows then enumerate the remaining dimensions. lanes == 1 means row by row.

// Extrema of every window: outputs == 1 (key[0]), or 2 (minimum and maximum in one pass).
template <class Key>
struct Extrema {
  Windows windows;
  const Key* x;
  Key* y[2];
  void* offsets[2];  // null unless offset != none
  OrderedKey<Key> key[2];
  int outputs;
  OffsetType offset;
  bool last;                   // the last of equal elements wins, not the first
  int64_t first_tap;           // added to every offset: taps before it were cut, for they read nothing at any output
  int64_t x_stride, y_stride;  // along the window dimension; offsets are laid out like y
  int64_t lanes;
  StridedRows<2> rows;  // x, y
};

// grad_x[j] = sum of grad_y over the outputs whose winner is j. Every element of grad_x is written.
template <class T>
struct WinnerSums {
  Windows windows;
  const T* grad_y;
  const void* offsets;
  T* grad_x;
  OffsetType offset;
  int64_t grad_y_stride, offsets_stride, grad_x_stride;
  int64_t lanes;
  StridedRows<3> rows;  // grad_y, offsets, grad_x
};

// y[i] = values[winner of i], zero bits where there is none. Bits is the unsigned integer of the dtype's width.
template <class Bits>
struct WinnerGather {
  Windows windows;
  const Bits* values;
  const void* offsets;
  Bits* y;
  OffsetType offset;
  int64_t values_stride, offsets_stride, y_stride;
  int64_t lanes;
  StridedRows<3> rows;  // values, offsets, y
};

// index[i] = position of the winner in the unpadded row, -1 where there is none.
struct WinnerIndex {
  Windows windows;
  const void* offsets;
  int64_t* index;
  OffsetType offset;
  int64_t offsets_stride, index_stride;
  int64_t lanes;
  StridedRows<2> rows;  // offsets, index
};

}  // namespace pyperf::sliding_window
