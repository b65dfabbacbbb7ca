// The operators of the family between torch tensors and kernels, for any backend. A backend offers
//   template <class Key>  static void extrema(const Extrema<Key>&, const Tensor& like)
//   template <class T>    static void winner_sums(const WinnerSums<T>&, const Tensor& like)
//   template <class Bits> static void winner_gather(const WinnerGather<Bits>&, const Tensor& like)
//                         static void winner_index(const WinnerIndex&, const Tensor& like)
// where `like` names the device. Schemas are in sliding_window.cpp.
#pragma once

#include <string>
#include <tuple>
#include <type_traits>

#include "../kernels/math/half.h"
#include "../kernels/math/sliding_window.h"
#include "common/tensor.h"

namespace pyperf::sliding_window {

// ---- checks ----

inline Edge edge_named(const std::string& mode) {
  if (mode == "constant") return Edge::constant;
  if (mode == "reflect") return Edge::reflect;
  if (mode == "nearest") return Edge::nearest;
  if (mode == "wrap") return Edge::wrap;
  if (mode == "mirror") return Edge::mirror;
  require(false, "sliding_window: mode must be constant, reflect, nearest, wrap or mirror, got ", mode);
  return Edge::constant;
}

inline Windows checked_windows(const Tensor& of, int64_t dim, int64_t length, int64_t out_length, int64_t window,
                               int64_t stride, int64_t dilation, int64_t left, const std::string& mode) {
  constexpr int64_t limit = int64_t(1) << 60;  // sums and products of two of these must not overflow
  require(dim >= 0 && dim < of.dim(), "sliding_window: dim must be in [0, ", of.dim(), "), got ", dim);
  require(window >= 1 && stride >= 1 && dilation >= 1 && left >= 0 && out_length >= 0 && length >= 0,
          "sliding_window: window, stride and dilation must be >= 1 and padding >= 0");
  require(double(window) * double(dilation) + double(out_length) * double(stride) + double(left) < double(limit),
          "sliding_window: the padded row is too long");
  const Windows w{length, out_length, window, stride, dilation, left, edge_named(mode)};
  require(w.edge == Edge::constant || length > 0 || out_length == 0,
          "sliding_window: an empty row cannot be extended by mode ", mode);
  return w;
}

inline ScalarType offset_dtype(OffsetType type) {
  return type == OffsetType::u8 ? ScalarType::Byte : type == OffsetType::i16 ? ScalarType::Short : ScalarType::Int;
}

inline void check_offsets(const Tensor& offsets, const Windows& w) {
  require(offsets.scalar_type() == offset_dtype(offset_type(w.window)),
          "sliding_window: offsets of another dtype than window ", w.window, " has");
}

inline std::vector<int64_t> resized(const Tensor& x, int64_t dim, int64_t size) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[dim] = size;
  return sizes;
}

inline void check_sizes(const char* what, const Tensor& t, const std::vector<int64_t>& sizes) {
  require(t.dim() == int64_t(sizes.size()) && std::equal(sizes.begin(), sizes.end(), t.sizes().begin()),
          "sliding_window: ", what, " has a shape that does not belong to its companion");
}

inline void check_one_device(const Tensor& a, const Tensor& b) {
  require(a.device() == b.device(), "sliding_window: tensors must be on one device");
}

// ---- dtypes ----

struct Dtype {
  ElementKind kind;
  int64_t infinity;
};

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return {ElementKind::floating, 0x7f800000};
    case ScalarType::Half: return {ElementKind::floating, 0x7c00};
    case ScalarType::BFloat16: return {ElementKind::floating, 0x7f80};
    case ScalarType::Double: return {ElementKind::floating, 0x7ff0000000000000};
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long: return {ElementKind::signed_integer, 0};
    case ScalarType::Byte: return {ElementKind::unsigned_integer, 0};
    case ScalarType::Bool: return {ElementKind::boolean, 0};
    default: require(false, "sliding_window: unsupported dtype");
  }
  return {};
}

// visit(Key()) with the signed integer of the dtype's width.
template <class Visit>
void with_key(ScalarType type, const Visit& visit) {
  switch (type) {
    case ScalarType::Byte:
    case ScalarType::Bool:
    case ScalarType::Char: return visit(int8_t());
    case ScalarType::Half:
    case ScalarType::BFloat16:
    case ScalarType::Short: return visit(int16_t());
    case ScalarType::Float:
    case ScalarType::Int: return visit(int32_t());
    default: return visit(int64_t());
  }
}

// visit(T()) with the storage type of a float dtype.
template <class Visit>
void with_float(ScalarType type, const Visit& visit) {
  switch (type) {
    case ScalarType::Float: return visit(float());
    case ScalarType::Double: return visit(double());
    case ScalarType::Half: return visit(Float16());
    case ScalarType::BFloat16: return visit(BFloat16());
    default: require(false, "sliding_window: gradients need a float dtype");
  }
}

template <class T>
T* typed(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// ---- operators ----

enum class Which { maximum, minimum, both };

// Values and, where asked for, offsets: {y}, {y, offsets}, {min, max} or {min, max, min offsets, max offsets}.
template <class Backend>
std::vector<Tensor> extrema(Tensor x, int64_t dim, Which which, int64_t window, int64_t stride, int64_t dilation,
                            int64_t left, int64_t out_length, const std::string& mode, bool ignore_nan,
                            OffsetType offset, bool last) {
  const Windows w =
      checked_windows(x, dim, dim < x.dim() ? x.size(dim) : 0, out_length, window, stride, dilation, left, mode);
  require(offset == OffsetType::none || window < (int64_t(1) << 31), "sliding_window: offsets need window < 2**31");
  const Dtype dtype = dtype_of(x.scalar_type());
  const std::vector<int64_t> sizes = resized(x, dim, out_length);
  const int count = which == Which::both ? 2 : 1;
  std::vector<Tensor> out;
  const auto layout = physical_layout(x);
  for (int i = 0; i < count; ++i) out.push_back(empty(x, sizes, layout, x.scalar_type()));
  if (offset != OffsetType::none)
    for (int i = 0; i < count; ++i) out.push_back(empty(x, sizes, layout, offset_dtype(offset)));
  RowsAlong<2> along({&x, &out[0]}, dim);
  if (!along.fits) {
    return extrema<Backend>(contiguous(x), dim, which, window, stride, dilation, left, out_length, mode, ignore_nan,
                            offset, last);
  }
  with_key(x.scalar_type(), [&](auto key) {
    using Key = decltype(key);
    Extrema<Key> p{};
    p.windows = without_idle_taps(w, p.first_tap);
    p.x = typed<Key>(x);
    for (int i = 0; i < count; ++i) {
      const bool minimum = which == Which::both ? i == 0 : which == Which::minimum;
      p.y[i] = typed<Key>(out[i]);
      p.offsets[i] = offset != OffsetType::none ? out[count + i].data_ptr() : nullptr;
      p.key[i] = OrderedKey<Key>::make(dtype.kind, Key(dtype.infinity), minimum, ignore_nan);
    }
    p.outputs = count;
    p.offset = offset;
    p.last = last;
    p.x_stride = along.stride[0];
    p.y_stride = along.stride[1];
    p.lanes = along.lanes;
    p.rows = along.rows;
    Backend::extrema(p, x);
  });
  return out;
}

template <class Backend>
Tensor extremum(const Tensor& x, int64_t dim, int64_t window, int64_t stride, int64_t dilation, int64_t left,
                int64_t out_length, std::string mode, bool minimum, bool ignore_nan, bool last) {
  return extrema<Backend>(x, dim, minimum ? Which::minimum : Which::maximum, window, stride, dilation, left, out_length,
                          mode, ignore_nan, OffsetType::none, last)[0];
}

template <class Backend>
std::tuple<Tensor, Tensor> extremum_offsets(const Tensor& x, int64_t dim, int64_t window, int64_t stride,
                                            int64_t dilation, int64_t left, int64_t out_length, std::string mode,
                                            bool minimum, bool ignore_nan, bool last) {
  const auto out = extrema<Backend>(x, dim, minimum ? Which::minimum : Which::maximum, window, stride, dilation, left,
                                    out_length, mode, ignore_nan, offset_type(window), last);
  return {out[0], out[1]};
}

template <class Backend>
std::tuple<Tensor, Tensor> minmax(const Tensor& x, int64_t dim, int64_t window, int64_t stride, int64_t dilation,
                                  int64_t left, int64_t out_length, std::string mode, bool ignore_nan, bool last) {
  const auto out = extrema<Backend>(x, dim, Which::both, window, stride, dilation, left, out_length, mode, ignore_nan,
                                    OffsetType::none, last);
  return {out[0], out[1]};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> minmax_offsets(const Tensor& x, int64_t dim, int64_t window, int64_t stride,
                                                          int64_t dilation, int64_t left, int64_t out_length,
                                                          std::string mode, bool ignore_nan, bool last) {
  const auto out = extrema<Backend>(x, dim, Which::both, window, stride, dilation, left, out_length, mode, ignore_nan,
                                    offset_type(window), last);
  return {out[0], out[1], out[2], out[3]};
}

// grad_x from grad_y and the offsets of the forward; `length` is the size of x along dim.
template <class Backend>
Tensor backward(Tensor grad_y, Tensor offsets, int64_t dim, int64_t length, int64_t window, int64_t stride,
                int64_t dilation, int64_t left, std::string mode) {
  const int64_t out_length = dim >= 0 && dim < offsets.dim() ? offsets.size(dim) : 0;
  const Windows w = checked_windows(offsets, dim, length, out_length, window, stride, dilation, left, mode);
  check_offsets(offsets, w);
  check_one_device(grad_y, offsets);
  check_sizes("grad_y", grad_y, resized(offsets, dim, out_length));
  Tensor grad_x = empty(grad_y, resized(offsets, dim, length), physical_layout(offsets), grad_y.scalar_type());
  RowsAlong<3> along({&grad_y, &offsets, &grad_x}, dim);
  if (!along.fits)
    return backward<Backend>(contiguous(grad_y), contiguous(offsets), dim, length, window, stride, dilation, left,
                             mode);
  with_float(grad_y.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    WinnerSums<T> p{};
    p.windows = w;
    p.grad_y = typed<T>(grad_y);
    p.offsets = offsets.data_ptr();
    p.grad_x = typed<T>(grad_x);
    p.offset = offset_type(window);
    p.grad_y_stride = along.stride[0];
    p.offsets_stride = along.stride[1];
    p.grad_x_stride = along.stride[2];
    p.lanes = along.lanes;
    p.rows = along.rows;
    Backend::winner_sums(p, grad_y);
  });
  return grad_x;
}

// values at the winners: the transpose of backward.
template <class Backend>
Tensor gather(Tensor values, Tensor offsets, int64_t dim, int64_t window, int64_t stride, int64_t dilation,
              int64_t left, std::string mode) {
  const bool in_range = dim >= 0 && dim < offsets.dim() && values.dim() == offsets.dim();
  const int64_t out_length = in_range ? offsets.size(dim) : 0, length = in_range ? values.size(dim) : 0;
  const Windows w = checked_windows(offsets, dim, length, out_length, window, stride, dilation, left, mode);
  check_offsets(offsets, w);
  check_one_device(values, offsets);
  check_sizes("values", values, resized(offsets, dim, length));
  Tensor y = empty(values, resized(offsets, dim, out_length), physical_layout(offsets), values.scalar_type());
  RowsAlong<3> along({&values, &offsets, &y}, dim);
  if (!along.fits)
    return gather<Backend>(contiguous(values), contiguous(offsets), dim, window, stride, dilation, left, mode);
  with_key(values.scalar_type(), [&](auto key) {
    using Bits = std::make_unsigned_t<decltype(key)>;
    WinnerGather<Bits> p{};
    p.windows = w;
    p.values = typed<Bits>(values);
    p.offsets = offsets.data_ptr();
    p.y = typed<Bits>(y);
    p.offset = offset_type(window);
    p.values_stride = along.stride[0];
    p.offsets_stride = along.stride[1];
    p.y_stride = along.stride[2];
    p.lanes = along.lanes;
    p.rows = along.rows;
    Backend::winner_gather(p, values);
  });
  return y;
}

// int64 positions of the winners in the row, -1 where there is none.
template <class Backend>
Tensor index(Tensor offsets, int64_t dim, int64_t length, int64_t window, int64_t stride, int64_t dilation,
             int64_t left, std::string mode) {
  const int64_t out_length = dim >= 0 && dim < offsets.dim() ? offsets.size(dim) : 0;
  const Windows w = checked_windows(offsets, dim, length, out_length, window, stride, dilation, left, mode);
  check_offsets(offsets, w);
  Tensor result = empty(offsets, resized(offsets, dim, out_length), physical_layout(offsets), ScalarType::Long);
  RowsAlong<2> along({&offsets, &result}, dim);
  if (!along.fits) return index<Backend>(contiguous(offsets), dim, length, window, stride, dilation, left, mode);
  WinnerIndex p{};
  p.windows = w;
  p.offsets = offsets.data_ptr();
  p.index = typed<int64_t>(result);
  p.offset = offset_type(window);
  p.offsets_stride = along.stride[0];
  p.index_stride = along.stride[1];
  p.lanes = along.lanes;
  p.rows = along.rows;
  Backend::winner_index(p, offsets);
  return result;
}

}  // namespace pyperf::sliding_window

// Registers every operator of the family for one dispatch key.
#define PYPERF_IMPLEMENT_SLIDING_WINDOW(m, Backend)                                                          \
  m.impl("sliding_window_extremum", TORCH_BOX((pyperf::sliding_window::extremum<Backend>)));                 \
  m.impl("sliding_window_extremum_offsets", TORCH_BOX((pyperf::sliding_window::extremum_offsets<Backend>))); \
  m.impl("sliding_window_minmax", TORCH_BOX((pyperf::sliding_window::minmax<Backend>)));                     \
  m.impl("sliding_window_minmax_offsets", TORCH_BOX((pyperf::sliding_window::minmax_offsets<Backend>)));     \
  m.impl("sliding_window_backward", TORCH_BOX((pyperf::sliding_window::backward<Backend>)));                 \
  m.impl("sliding_window_gather", TORCH_BOX((pyperf::sliding_window::gather<Backend>)));                     \
  m.impl("sliding_window_index", TORCH_BOX((pyperf::sliding_window::index<Backend>)))
