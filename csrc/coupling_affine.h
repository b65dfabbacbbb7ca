// Affine couplings between torch and kernels/: checks, outputs, and the elements that a kernel is to walk. A backend
// offers, for R float and double,
//   template <class R> static void forward(const AffineCall<kForwardOperands>&, const Tensor& like)
//   template <class R> static void backward(const AffineCall<kBackwardOperands>&, const Tensor& like)
// Schemas are in coupling_affine.cpp.
#pragma once

#include <limits>
#include <string>
#include <tuple>

#include "../kernels/common/sample_units.h"
#include "../kernels/math/coupling_affine_call.h"
#include "coupling.h"

namespace pyperf::coupling {

struct AffineArguments {
  bool inverse;
  std::string activation;
  double clamp;  // 0: none
  bool shift_first;
  int64_t sample_dims;

  Affine affine() const {
    Affine how{};
    how.scale_sign = inverse != (activation == "sigmoid_inv") ? -1 : 1;
    how.shift_sign = inverse ? -1 : 1;
    how.shift_before = inverse != shift_first;
    how.activation = named(activation);
    const bool bounded = how.activation == Activation::tanh || how.activation == Activation::atan ||
                         how.activation == Activation::softclip;
    require(clamp >= 0 && (clamp > 0 || !bounded), "affine_coupling: clamp must be > 0 for ", activation);
    how.clamp = clamp > 0 ? clamp : std::numeric_limits<double>::infinity();
    return how;
  }

 private:
  static Activation named(const std::string& name) {
    if (name == "none") return Activation::none;
    if (name == "exp") return Activation::exp;
    if (name == "sigmoid" || name == "sigmoid_inv") return Activation::sigmoid;
    if (name == "softplus") return Activation::softplus;
    if (name == "tanh") return Activation::tanh;
    if (name == "atan") return Activation::atan;
    require(name == "softclip", "affine_coupling: unknown activation ", name);
    return Activation::softclip;
  }
};

namespace affine {

inline void check_companion(const char* what, const Tensor& t, const Tensor& x, int64_t dims) {
  require(t.dim() == dims && std::equal(t.sizes().begin(), t.sizes().end(), x.sizes().begin()),
          "affine_coupling: ", what, " has a shape that does not belong to x");
  require(t.device() == x.device(), "affine_coupling: tensors must be on one device");
}

inline void check_inputs(const Tensor& x, const Tensor& scale, const Tensor& shift, int64_t sample_dims) {
  check_companion("scale", scale, x, x.dim());
  check_companion("shift", shift, x, x.dim());
  require(sample_dims >= -1 && sample_dims <= x.dim(), "affine_coupling: sample_dims must be in [-1, ", x.dim(),
          "], got ", sample_dims);
  const Storage of_x = storage_of(x), of_scale = storage_of(scale);
  require(of_scale == storage_of(shift), "affine_coupling: scale and shift must have one dtype");
  require(of_x == of_scale || (of_x == Storage::f32 && of_scale != Storage::f64),
          "affine_coupling: scale and shift must have the dtype of x, or 16 bits for a float32 x");
}

// A new tensor like `t`, which keeps the order of its dimensions in memory.
inline Tensor empty_as(const Tensor& t, ScalarType dtype) {
  return empty(t, sizes_of(t, t.dim()), preserved_layout(t), dtype);
}

// False where the operands' dimensions cannot be walked as they are. `logdet`: that operand, contiguous if summed.
template <int N>
bool make_call(const std::array<const Tensor*, N>& operands, int logdet, const AffineArguments& how,
               AffineCall<N>& call) {
  const Tensor& shape = *operands[N - 1];
  const bool summed = how.sample_dims >= 0;
  std::array<std::vector<int64_t>, N> strides;
  std::array<const int64_t*, N> starts;
  for (int k = 0; k < N; ++k) {
    const Tensor& walked = summed && k == logdet ? shape : *operands[k];
    strides[k].assign(walked.strides().begin(), walked.strides().end());
    starts[k] = strides[k].data();
  }
  const std::vector<int64_t> sizes = sizes_of(shape, shape.dim());
  const ElementRuns<N> runs(sizes.data(), shape.dim(), starts, std::max<int64_t>(how.sample_dims, 0));
  if (!runs.fits) return false;
  call.how = how.affine();
  call.rows = runs.rows;
  call.n = runs.n;
  for (int k = 0; k < N; ++k) {
    call.stride[k] = runs.stride[k];
    call.data[k] = operands[k]->data_ptr();
    call.type[k] = storage_of(*operands[k]);
  }
  call.samples = runs.samples, call.sample_size = runs.sample_size;
  call.summed = summed;
  return true;
}

}  // namespace affine

template <class Backend>
std::tuple<Tensor, Tensor> affine_coupling(Tensor x, Tensor scale, Tensor shift, bool inverse, std::string activation,
                                           double clamp, bool shift_first, int64_t sample_dims) {
  const AffineArguments how{inverse, activation, clamp, shift_first, sample_dims};
  affine::check_inputs(x, scale, shift, sample_dims);
  const Tensor y = affine::empty_as(x, x.scalar_type());
  std::vector<int64_t> logical(std::max<int64_t>(sample_dims, 0));
  std::iota(logical.begin(), logical.end(), int64_t(0));
  const ScalarType type = logdet_type(x);
  const Tensor logdet = sample_dims < 0 ? affine::empty_as(x, type) : empty(x, sizes_of(x, sample_dims), logical, type);
  AffineCall<kForwardOperands> call{};
  if (!affine::make_call<kForwardOperands>({&x, &scale, &shift, &logdet, &y}, kLogdet, how, call)) {
    const auto [dense_y, dense_logdet] = affine_coupling<Backend>(contiguous(x), contiguous(scale), contiguous(shift),
                                                                  inverse, activation, clamp, shift_first, sample_dims);
    Tensor into_y = y, into_logdet = logdet;
    copy_(into_y, dense_y);
    copy_(into_logdet, dense_logdet);
    return {y, logdet};
  }
  if (type == ScalarType::Double)
    Backend::template forward<double>(call, x);
  else
    Backend::template forward<float>(call, x);
  return {y, logdet};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> affine_coupling_backward(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor scale,
                                                            Tensor shift, bool inverse, std::string activation,
                                                            double clamp, bool shift_first, int64_t sample_dims) {
  const AffineArguments how{inverse, activation, clamp, shift_first, sample_dims};
  affine::check_inputs(x, scale, shift, sample_dims);
  affine::check_companion("grad_y", grad_y, x, x.dim());
  affine::check_companion("grad_logdet", grad_logdet, x, sample_dims < 0 ? x.dim() : sample_dims);
  require(grad_y.scalar_type() == x.scalar_type() && grad_logdet.scalar_type() == logdet_type(x),
          "affine_coupling: gradients must have the dtypes of the outputs");
  const Tensor of_logdet = sample_dims < 0 ? grad_logdet : contiguous(grad_logdet);
  const Tensor grad_x = affine::empty_as(x, x.scalar_type());
  const Tensor grad_scale = affine::empty_as(scale, scale.scalar_type());
  const Tensor grad_shift = affine::empty_as(shift, shift.scalar_type());
  AffineCall<kBackwardOperands> call{};
  if (!affine::make_call<kBackwardOperands>(
          {&grad_y, &of_logdet, &x, &scale, &shift, &grad_scale, &grad_shift, &grad_x}, kGradLogdet, how, call)) {
    const auto [dense_x, dense_scale, dense_shift] =
        affine_coupling_backward<Backend>(contiguous(grad_y), contiguous(grad_logdet), contiguous(x), contiguous(scale),
                                          contiguous(shift), inverse, activation, clamp, shift_first, sample_dims);
    Tensor into_x = grad_x, into_scale = grad_scale, into_shift = grad_shift;
    copy_(into_x, dense_x);
    copy_(into_scale, dense_scale);
    copy_(into_shift, dense_shift);
    return {grad_x, grad_scale, grad_shift};
  }
  if (x.scalar_type() == ScalarType::Double)
    Backend::template backward<double>(call, x);
  else
    Backend::template backward<float>(call, x);
  return {grad_x, grad_scale, grad_shift};
}

}  // namespace pyperf::coupling

// Registers the affine operators for one dispatch key.
#define PYPERF_IMPLEMENT_AFFINE_COUPLING(m, Backend)                                  \
  m.impl("affine_coupling", TORCH_BOX((pyperf::coupling::affine_coupling<Backend>))); \
  m.impl("affine_coupling_backward", TORCH_BOX((pyperf::coupling::affine_coupling_backward<Backend>)))
