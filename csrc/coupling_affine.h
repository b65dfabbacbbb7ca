// Affine couplings between torch and kernels/: checks, outputs, and the elements that a kernel is to walk. A backend
// offers, for R float and double,
//   template <class R> static void forward(const AffineCall<kForwardOperands>&, const Tensor& like)
//   template <class R> static void backward(const AffineCall<kBackwardOperands>&, const Tensor& like)
//   static constexpr bool kCopiesOthers: whether these copy the channels that pass
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
  double clamp, min_scale, max_scale;  // 0: none
  bool shift_first;
  int64_t sample_dims;

  Affine affine() const {
    Affine how{};
    how.scale_sign = inverse != (activation == "sigmoid_inv") ? -1 : 1;
    how.shift_sign = inverse ? -1 : 1;
    how.shift_before = inverse != shift_first;
    how.activation = named(activation);
    set_floor(how);
    const bool bounded = how.activation == Activation::tanh || how.activation == Activation::atan ||
                         how.activation == Activation::softclip;
    require(clamp >= 0 && (clamp > 0 || !bounded), "affine_coupling: clamp must be > 0 for ", activation);
    how.clamp = clamp > 0 ? clamp : std::numeric_limits<double>::infinity();
    return how;
  }

 private:
  void set_floor(Affine& how) const {
    const bool floor = min_scale > 0;
    require(min_scale >= 0 && (max_scale == 0 || (floor && max_scale > min_scale)),
            "affine_coupling: min_scale must be >= 0, and max_scale above a min_scale > 0, or 0 for none");
    how.min_scale = min_scale, how.max_scale = max_scale > 0 ? max_scale : std::numeric_limits<double>::infinity();
    if (!floor) return;
    require(activation == "sigmoid" || activation == "softplus",
            "affine_coupling: min_scale is for sigmoid and softplus, got ", activation);
    how.activation = activation == "sigmoid" ? Activation::sigmoid_floor : Activation::softplus_floor;
  }
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

inline void check_shape(const char* what, const Tensor& t, const Tensor& x, const std::vector<int64_t>& sizes) {
  require(std::equal(t.sizes().begin(), t.sizes().end(), sizes.begin(), sizes.end()), "affine_coupling: ", what,
          " has a shape that does not belong to x");
  require(t.device() == x.device(), "affine_coupling: tensors must be on one device");
}

inline void check_inputs(const Tensor& x, const Tensor& parameter, const AffineArguments& how) {
  require(how.sample_dims >= -1 && how.sample_dims <= x.dim(), "affine_coupling: sample_dims must be in [-1, ", x.dim(),
          "], got ", how.sample_dims);
  const Storage of_x = storage_of(x), of_parameter = storage_of(parameter);
  require(of_x == of_parameter || (of_x == Storage::f32 && of_parameter != Storage::f64),
          "affine_coupling: scale and shift must have the dtype of x, or 16 bits for a float32 x");
}

inline void check_pair(const Tensor& x, const Tensor& scale, const Tensor& shift, const AffineArguments& how) {
  check_shape("scale", scale, x, sizes_of(x, x.dim()));
  check_shape("shift", shift, x, sizes_of(x, x.dim()));
  check_inputs(x, scale, how);
  require(storage_of(scale) == storage_of(shift), "affine_coupling: scale and shift must have one dtype");
}

inline void check_gradients(const Tensor& grad_y, const Tensor& grad_logdet, const Tensor& x, const Split& split,
                            int64_t sample_dims) {
  check_shape("grad_y", grad_y, x, sizes_of(x, x.dim()));
  std::vector<int64_t> sizes = split.shape(x);
  if (sample_dims >= 0) sizes.resize(sample_dims);
  check_shape("grad_logdet", grad_logdet, x, sizes);
  require(grad_y.scalar_type() == x.scalar_type() && grad_logdet.scalar_type() == logdet_type(x),
          "affine_coupling: gradients must have the dtypes of the outputs");
}

// Where the two parameters of an element are in the last dimension of a tensor; an additive coupling has but the shift.
struct Packing {
  int64_t scale, shift, count;

  Packing(const Tensor& params, bool shift_leads, bool additive) : count(additive ? 1 : 2) {
    shift = additive || shift_leads ? 0 : 1, scale = additive ? 0 : 1 - shift;
    require(params.dim() > 0 && params.size(params.dim() - 1) == count, "affine_coupling: params must have ", count,
            " in the last dimension");
  }
};

inline Split checked_split(const Tensor& x, const Tensor& params, const Packing& packing,
                           const std::optional<std::vector<int64_t>>& split, const AffineArguments& how) {
  const Split channels(x, params, split);
  std::vector<int64_t> sizes = channels.shape(x);
  sizes.push_back(packing.count);
  check_shape("params", params, x, sizes);
  check_inputs(x, params, how);
  return channels;
}

// False where the operands' dimensions cannot be walked as they are. `logdet`: that operand, contiguous if summed.
template <int N>
bool make_call(const std::array<Strided, N>& operands, int logdet, const AffineArguments& how, AffineCall<N>& call) {
  const Strided& shape = operands[N - 1];
  const bool summed = how.sample_dims >= 0;
  std::array<const int64_t*, N> strides;
  for (int k = 0; k < N; ++k) strides[k] = (summed && k == logdet ? shape : operands[k]).strides.data();
  const ElementRuns<N> runs(shape.sizes.data(), int64_t(shape.sizes.size()), strides,
                            std::max<int64_t>(how.sample_dims, 0));
  if (!runs.fits) return false;
  call.how = how.affine();
  call.rows = runs.rows;
  call.n = runs.n;
  for (int k = 0; k < N; ++k) {
    call.stride[k] = runs.stride[k];
    call.data[k] = operands[k].data;
    call.type[k] = operands[k].type;
  }
  call.samples = runs.samples, call.sample_size = runs.sample_size;
  call.summed = summed;
  return true;
}

}  // namespace affine

// False where the caller has to copy its tensors first.
template <class Backend>
bool run_affine(const Tensor& x, const Strided& scale, const Strided& shift, const Split& split,
                const AffineArguments& how, const Tensor& y, const Tensor& logdet) {
  AffineCall<kForwardOperands> call{};
  if (!affine::make_call<kForwardOperands>({split.part_of(x), scale, shift, logdet, split.part_of(y)}, kLogdet, how,
                                           call))
    return false;
  call.others = split.copy_or_plan_others<Backend>(x, y);
  if (logdet.scalar_type() == ScalarType::Double)
    Backend::template forward<double>(call, x);
  else
    Backend::template forward<float>(call, x);
  return true;
}

template <class Backend>
bool run_affine_backward(const Tensor& grad_y, const Tensor& grad_logdet, const Tensor& x, const Strided& scale,
                         const Strided& shift, const Split& split, const AffineArguments& how, const Tensor& grad_x,
                         const Strided& grad_scale, const Strided& grad_shift) {
  AffineCall<kBackwardOperands> call{};
  if (!affine::make_call<kBackwardOperands>({split.part_of(grad_y), grad_logdet, split.part_of(x), scale, shift,
                                             grad_scale, grad_shift, split.part_of(grad_x)},
                                            kGradLogdet, how, call))
    return false;
  call.others = split.copy_or_plan_others<Backend>(grad_y, grad_x);
  if (x.scalar_type() == ScalarType::Double)
    Backend::template backward<double>(call, x);
  else
    Backend::template backward<float>(call, x);
  return true;
}

// ---- operators ----

template <class Backend>
std::tuple<Tensor, Tensor> affine_coupling(Tensor x, Tensor scale, Tensor shift, bool inverse, std::string activation,
                                           double clamp, double min_scale, double max_scale, bool shift_first,
                                           int64_t sample_dims) {
  const AffineArguments how{inverse, activation, clamp, min_scale, max_scale, shift_first, sample_dims};
  const Split split;
  affine::check_pair(x, scale, shift, how);
  auto [y, logdet] = empty_outputs(x, split, sample_dims);
  if (!run_affine<Backend>(x, scale, shift, split, how, y, logdet)) {
    const auto [dense_y, dense_logdet] =
        affine_coupling<Backend>(contiguous(x), contiguous(scale), contiguous(shift), inverse, activation, clamp,
                                 min_scale, max_scale, shift_first, sample_dims);
    copy_(y, dense_y);
    copy_(logdet, dense_logdet);
  }
  return {y, logdet};
}

template <class Backend>
std::tuple<Tensor, Tensor> affine_coupling_packed(Tensor x, Tensor params, bool inverse, std::string activation,
                                                  double clamp, double min_scale, double max_scale, bool shift_first,
                                                  bool shift_leads, std::optional<std::vector<int64_t>> split,
                                                  int64_t sample_dims) {
  const AffineArguments how{inverse, activation, clamp, min_scale, max_scale, shift_first, sample_dims};
  const affine::Packing packing(params, shift_leads, activation == "none");
  const Split channels = affine::checked_split(x, params, packing, split, how);
  auto [y, logdet] = empty_outputs(x, channels, sample_dims);
  const Strided all = params;
  if (!run_affine<Backend>(x, all.of_last(packing.scale), all.of_last(packing.shift), channels, how, y, logdet)) {
    const auto [dense_y, dense_logdet] =
        affine_coupling_packed<Backend>(contiguous(x), contiguous(params), inverse, activation, clamp, min_scale,
                                        max_scale, shift_first, shift_leads, split, sample_dims);
    copy_(y, dense_y);
    copy_(logdet, dense_logdet);
  }
  return {y, logdet};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> affine_coupling_backward(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor scale,
                                                            Tensor shift, bool inverse, std::string activation,
                                                            double clamp, double min_scale, double max_scale,
                                                            bool shift_first, int64_t sample_dims) {
  const AffineArguments how{inverse, activation, clamp, min_scale, max_scale, shift_first, sample_dims};
  const Split split;
  affine::check_pair(x, scale, shift, how);
  affine::check_gradients(grad_y, grad_logdet, x, split, sample_dims);
  const Tensor of_logdet = sample_dims < 0 ? grad_logdet : contiguous(grad_logdet);
  Tensor grad_x = empty_as(x, x.scalar_type());
  Tensor grad_scale = empty_as(scale, scale.scalar_type());
  Tensor grad_shift = empty_as(shift, shift.scalar_type());
  if (!run_affine_backward<Backend>(grad_y, of_logdet, x, scale, shift, split, how, grad_x, grad_scale, grad_shift)) {
    const auto [dense_x, dense_scale, dense_shift] = affine_coupling_backward<Backend>(
        contiguous(grad_y), contiguous(grad_logdet), contiguous(x), contiguous(scale), contiguous(shift), inverse,
        activation, clamp, min_scale, max_scale, shift_first, sample_dims);
    copy_(grad_x, dense_x);
    copy_(grad_scale, dense_scale);
    copy_(grad_shift, dense_shift);
  }
  return {grad_x, grad_scale, grad_shift};
}

template <class Backend>
std::tuple<Tensor, Tensor> affine_coupling_packed_backward(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor params,
                                                           bool inverse, std::string activation, double clamp,
                                                           double min_scale, double max_scale, bool shift_first,
                                                           bool shift_leads, std::optional<std::vector<int64_t>> split,
                                                           int64_t sample_dims) {
  require(activation != "none", "affine_coupling: an additive coupling needs no kernel for its gradients");
  const AffineArguments how{inverse, activation, clamp, min_scale, max_scale, shift_first, sample_dims};
  const affine::Packing packing(params, shift_leads, false);
  const Split channels = affine::checked_split(x, params, packing, split, how);
  affine::check_gradients(grad_y, grad_logdet, x, channels, sample_dims);
  const Tensor of_logdet = sample_dims < 0 ? grad_logdet : contiguous(grad_logdet);
  Tensor grad_x = empty_as(x, x.scalar_type()), grad_params = empty_as(params, params.scalar_type());
  const Strided all = params, grads = grad_params;
  if (!run_affine_backward<Backend>(grad_y, of_logdet, x, all.of_last(packing.scale), all.of_last(packing.shift),
                                    channels, how, grad_x, grads.of_last(packing.scale),
                                    grads.of_last(packing.shift))) {
    const auto [dense_x, dense_params] = affine_coupling_packed_backward<Backend>(
        contiguous(grad_y), contiguous(grad_logdet), contiguous(x), contiguous(params), inverse, activation, clamp,
        min_scale, max_scale, shift_first, shift_leads, split, sample_dims);
    copy_(grad_x, dense_x);
    copy_(grad_params, dense_params);
  }
  return {grad_x, grad_params};
}

}  // namespace pyperf::coupling

// Registers the affine operators for one dispatch key.
#define PYPERF_IMPLEMENT_AFFINE_COUPLING(m, Backend)                                                    \
  m.impl("affine_coupling", TORCH_BOX((pyperf::coupling::affine_coupling<Backend>)));                   \
  m.impl("affine_coupling_packed", TORCH_BOX((pyperf::coupling::affine_coupling_packed<Backend>)));     \
  m.impl("affine_coupling_backward", TORCH_BOX((pyperf::coupling::affine_coupling_backward<Backend>))); \
  m.impl("affine_coupling_packed_backward", TORCH_BOX((pyperf::coupling::affine_coupling_packed_backward<Backend>)))
