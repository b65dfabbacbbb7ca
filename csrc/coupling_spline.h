// Splines between torch and kernels/: checks, outputs, and the elements that a kernel is to walk. One template serves
// every backend; schemas are in coupling.cpp.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../kernels/common/sample_units.h"
#include "../kernels/math/coupling.h"
#include "coupling.h"

namespace pyperf::coupling {

// ---- checks ----

inline Tails tails_named(const std::string& name) {
  if (name == "linear") return Tails::linear;
  if (name == "circular") return Tails::circular;
  if (name == "mixed") return Tails::mixed;
  require(name == "bounded", "coupling: tails must be linear, circular, bounded or mixed, got ", name);
  return Tails::bounded;
}

// Arguments of the operator beside x and its parameters.
struct SplineArguments {
  std::optional<Tensor> bound;  // of each element
  bool inverse;
  std::string tails, parametrization;
  std::vector<double> box, least;
  double logit_scale, curve;
  int64_t sample_dims;
  bool exact;

  template <class R>
  Spline<R> spline(int64_t bins) const {
    require(bins >= 1 && bins <= 256, "coupling: bins must be in [1, 256], got ", bins);
    require(box.size() == 4 && least.size() == 3, "coupling: box has four numbers, smallest three");
    require(parametrization == "nflows" || parametrization == "zuko",
            "coupling: parametrization must be nflows or zuko, got ", parametrization);
    require(bound || tails != "mixed", "coupling: mixed tails need bounds, whose signs are the tails");
    return make_spline<R>(int(bins), tails_named(tails), inverse, parametrization == "zuko", bound.has_value(),
                          {box[0], box[1], box[2], box[3]}, {least[0], least[1], least[2]}, logit_scale, curve);
  }
};

// Some of a parameter tensor's last dimension: where it starts and how far apart its elements are.
struct Parameters {
  const Tensor* of;
  int64_t first, count;

  void* data() const {
    return static_cast<char*>(of->data_ptr()) + first * of->stride(of->dim() - 1) * storage_bytes(storage_of(*of));
  }
  int64_t stride() const { return of->stride(of->dim() - 1); }
};

inline bool follows(const Parameters& after, const Parameters& before) {
  const auto strides = [](const Tensor& t) { return std::vector<int64_t>(t.strides().begin(), t.strides().end()); };
  const int64_t bytes = before.count * before.stride() * storage_bytes(storage_of(*before.of));
  return static_cast<char*>(before.data()) + bytes == after.data() && strides(*before.of) == strides(*after.of);
}

// Tensors of one call. Forward: no gradients, logdet is a result. Backward: logdet is its gradient.
struct SplineTensors {
  Tensor x;
  std::array<Parameters, 3> parameters;  // widths, heights, derivatives
  std::array<Parameters, 3> gradients;   // of them; only in a backward
  const Tensor* grad_y = nullptr;
  const Tensor* bound = nullptr;
  Tensor logdet, result;
  bool backward = false;
};

inline void check_parameters(const Tensor& x, const Parameters& p, int64_t count, ScalarType type) {
  require(p.of->dim() == x.dim() + 1 && std::equal(x.sizes().begin(), x.sizes().end(), p.of->sizes().begin()),
          "coupling: parameters must have the shape of x and one more dimension");
  require(p.first >= 0 && p.count == count && p.first + p.count <= p.of->size(x.dim()),
          "coupling: unexpected number of parameters");
  require(p.of->device() == x.device(), "coupling: tensors must be on one device");
  require(p.of->scalar_type() == type, "coupling: widths, heights and derivatives must have one dtype");
}

inline void check_shape(const char* what, const Tensor& t, const Tensor& x, int64_t dims) {
  require(t.dim() == dims && std::equal(t.sizes().begin(), t.sizes().end(), x.sizes().begin()), "coupling: ", what,
          " has another shape than its companion");
  require(t.device() == x.device(), "coupling: tensors must be on one device");
}

inline void check_arguments(const Tensor& x, const SplineArguments& how) {
  require(how.sample_dims >= -1 && how.sample_dims <= x.dim(), "coupling: sample_dims out of range");
  if (!how.bound) return;
  check_shape("bound", *how.bound, x, x.dim());
  require(how.bound->scalar_type() == logdet_type(x), "coupling: bound must have the dtype of log-dets");
}

// ---- elements ----

// Apart from the operands, which could not be walked in long rows beside a tensor that repeats. False as below.
inline bool spline_bounds(const SplineTensors& t, int64_t sample_dims, SplineBounds& bounds) {
  bounds.data = nullptr;
  if (!t.bound) return true;
  std::array<const int64_t*, 2> strides{t.bound->strides().data(), t.result.strides().data()};
  const ElementRuns<2> runs(t.x.sizes().data(), t.x.dim(), strides, std::max<int64_t>(sample_dims, 0));
  if (!runs.fits) return false;
  bounds.rows.count = runs.rows.count, bounds.rows.dims = runs.rows.dims;
  for (int d = 0; d < runs.rows.dims; ++d) {
    bounds.rows.size[d] = runs.rows.size[d];
    bounds.rows.stride[0][d] = runs.rows.stride[0][d];
  }
  bounds.n = runs.n, bounds.stride = runs.stride[0];
  bounds.data = t.bound->data_ptr();
  return true;
}

// False where the tensors' dimensions cannot be walked as they are.
inline bool spline_elements(const SplineTensors& t, int64_t sample_dims, SplineElements& e) {
  const Tensor& x = t.x;
  const int64_t dims = x.dim();
  const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  e.summed = sample_dims >= 0;
  std::array<const Tensor*, kSplineOperands> operands{};
  operands.fill(&t.result);
  operands[kInput] = &x;
  for (int k = 0; k < 3; ++k) {
    operands[kWidths + k] = t.parameters[k].of;
    if (t.backward) operands[kGradWidths + k] = t.gradients[k].of;
  }
  if (t.backward) operands[kGradOutput] = t.grad_y;
  if (!e.summed) operands[kLogdet] = &t.logdet;
  std::array<std::vector<int64_t>, kSplineOperands> strides;
  std::array<const int64_t*, kSplineOperands> starts{};
  for (int k = 0; k < kSplineOperands; ++k) {
    const Tensor& walked = operands[k]->numel() == 0 ? t.result : *operands[k];  // one bin has no derivatives
    for (int64_t d = 0; d < dims; ++d) strides[k].push_back(walked.stride(d));
    starts[k] = strides[k].data();
  }
  const ElementRuns<kSplineOperands> runs(sizes.data(), dims, starts, std::max<int64_t>(sample_dims, 0));
  if (!runs.fits) return false;
  e.rows = runs.rows;
  e.n = runs.n;
  e.count = runs.elements();
  e.samples = runs.samples, e.sample_size = runs.sample_size;
  for (int k = 0; k < kSplineOperands; ++k) e.stride[k] = runs.stride[k];
  e.type = storage_of(x);
  e.parameter_type = storage_of(*t.parameters[0].of);
  e.logdet_type = storage_of(t.logdet);
  e.data[kInput] = x.data_ptr();
  e.data[kResult] = t.result.data_ptr();
  for (int k = 0; k < 3; ++k) {
    e.data[kWidths + k] = t.parameters[k].data();
    e.parameter_stride[kWidths + k] = t.parameters[k].stride();
    if (!t.backward) continue;
    e.data[kGradWidths + k] = t.gradients[k].data();
    e.parameter_stride[kGradWidths + k] = t.gradients[k].stride();
  }
  e.packed = follows(t.parameters[1], t.parameters[0]) && follows(t.parameters[2], t.parameters[1]);
  if (t.backward) {
    e.data[kGradOutput] = t.grad_y->data_ptr();
    e.grads_packed = follows(t.gradients[1], t.gradients[0]) && follows(t.gradients[2], t.gradients[1]);
  }
  (e.summed ? e.sample_logdet : e.data[kLogdet]) = t.logdet.data_ptr();
  return spline_bounds(t, sample_dims, e.bounds);
}

template <class Backend, bool kBackward>
bool run_spline(const SplineTensors& t, const SplineArguments& how, int64_t bins) {
  SplineElements e{};
  if (!spline_elements(t, how.sample_dims, e)) return false;
  const bool wide = how.exact || e.type == Storage::f64 || e.parameter_type == Storage::f64;
  if (wide)
    Backend::template spline<kBackward>(e, how.spline<double>(bins), t.x);
  else
    Backend::template spline<kBackward>(e, how.spline<float>(bins), t.x);
  return true;
}

// ---- operators ----

// The same arguments with a copy of the bounds, which can always be walked.
inline SplineArguments copied(SplineArguments how) {
  if (how.bound) how.bound = contiguous(*how.bound);
  return how;
}
// The same parameters in `copies`.
inline std::array<Parameters, 3> copied(std::array<Parameters, 3> parameters, std::array<Tensor, 3>& copies) {
  for (int k = 0; k < 3; ++k) {
    copies[k] = contiguous(*parameters[k].of);
    parameters[k].of = &copies[k];
  }
  return parameters;
}

template <class Backend>
std::tuple<Tensor, Tensor> spline_forward(const Tensor& x, const std::array<Parameters, 3>& parameters,
                                          const SplineArguments& how, int64_t bins) {
  const Spline<double> s = how.spline<double>(bins);
  const int64_t counts[] = {bins, bins, s.derivatives()};
  for (int k = 0; k < 3; ++k) check_parameters(x, parameters[k], counts[k], parameters[0].of->scalar_type());
  check_arguments(x, how);
  SplineTensors t;
  t.x = x;
  t.parameters = parameters;
  t.bound = how.bound ? &*how.bound : nullptr;
  const auto layout = preserved_layout(x);
  t.result = empty(x, sizes_of(x, x.dim()), layout, x.scalar_type());
  if (how.sample_dims < 0) {
    t.logdet = empty(x, sizes_of(x, x.dim()), layout, logdet_type(x));
  } else {
    std::vector<int64_t> logical(how.sample_dims);
    std::iota(logical.begin(), logical.end(), int64_t(0));
    t.logdet = empty(x, sizes_of(x, how.sample_dims), logical, logdet_type(x));
  }
  if (run_spline<Backend, false>(t, how, bins)) return {t.result, t.logdet};
  std::array<Tensor, 3> copies;
  const auto [y, logdet] = spline_forward<Backend>(contiguous(x), copied(parameters, copies), copied(how), bins);
  copy_(t.result, y);
  copy_(t.logdet, logdet);
  return {t.result, t.logdet};
}

// Gradients of x, and of the parameters into `gradients`, whose tensors are there.
template <class Backend>
Tensor spline_backward(const Tensor& grad_y, const Tensor& grad_logdet, const Tensor& x,
                       const std::array<Parameters, 3>& parameters, const std::array<Parameters, 3>& gradients,
                       const SplineArguments& how, int64_t bins) {
  const Spline<double> s = how.spline<double>(bins);
  const int64_t counts[] = {bins, bins, s.derivatives()};
  for (int k = 0; k < 3; ++k) check_parameters(x, parameters[k], counts[k], parameters[0].of->scalar_type());
  check_arguments(x, how);
  check_shape("grad_y", grad_y, x, x.dim());
  check_shape("grad_logdet", grad_logdet, x, how.sample_dims < 0 ? x.dim() : how.sample_dims);
  require(grad_y.scalar_type() == x.scalar_type() && grad_logdet.scalar_type() == logdet_type(x),
          "coupling: a gradient has another dtype than its companion");
  SplineTensors t;
  t.x = x;
  t.parameters = parameters;
  t.bound = how.bound ? &*how.bound : nullptr;
  t.gradients = gradients;
  t.grad_y = &grad_y;
  t.logdet = how.sample_dims < 0 ? grad_logdet : contiguous(grad_logdet);
  t.backward = true;
  t.result = empty(x, sizes_of(x, x.dim()), preserved_layout(x), x.scalar_type());
  if (run_spline<Backend, true>(t, how, bins)) return t.result;
  std::array<Tensor, 3> copies, dense;
  std::array<Parameters, 3> into = gradients;
  for (int k = 0; k < 3; ++k) {
    const bool packed = k > 0 && gradients[k].of == gradients[0].of;
    if (!packed) dense[k] = contiguous(*gradients[k].of);
    into[k].of = packed ? &dense[0] : &dense[k];
  }
  const Tensor grad_x = spline_backward<Backend>(contiguous(grad_y), contiguous(grad_logdet), contiguous(x),
                                                 copied(parameters, copies), into, copied(how), bins);
  copy_(t.result, grad_x);
  for (int k = 0; k < 3; ++k) {
    Tensor gradient = *gradients[k].of;
    if (into[k].of == &dense[k]) copy_(gradient, dense[k]);
  }
  return t.result;
}

inline Tensor gradient_like(const Tensor& t) {
  return empty(t, sizes_of(t, t.dim()), preserved_layout(t), t.scalar_type());
}
inline std::array<Parameters, 3> split(const Tensor& packed, int64_t bins) {
  return {Parameters{&packed, 0, bins}, Parameters{&packed, bins, bins},
          Parameters{&packed, 2 * bins, packed.size(packed.dim() - 1) - 2 * bins}};
}
inline std::array<Parameters, 3> whole(const Tensor& widths, const Tensor& heights, const Tensor& derivatives) {
  const auto all = [](const Tensor& t) { return Parameters{&t, 0, t.size(t.dim() - 1)}; };
  require(widths.dim() > 0 && heights.dim() > 0 && derivatives.dim() > 0, "coupling: parameters need a dimension");
  return {all(widths), all(heights), all(derivatives)};
}

template <class Backend>
std::tuple<Tensor, Tensor> rational_quadratic_spline(const Tensor& x, const Tensor& widths, const Tensor& heights,
                                                     const Tensor& derivatives, std::optional<Tensor> bound,
                                                     bool inverse, std::string tails, std::string parametrization,
                                                     std::vector<double> box, std::vector<double> smallest,
                                                     double logit_scale, double curve, int64_t sample_dims,
                                                     bool exact) {
  const SplineArguments how{bound,    inverse,     tails, parametrization, box,
                            smallest, logit_scale, curve, sample_dims,     exact};
  const auto parameters = whole(widths, heights, derivatives);
  return spline_forward<Backend>(x, parameters, how, parameters[0].count);
}

template <class Backend>
std::tuple<Tensor, Tensor> rational_quadratic_spline_packed(const Tensor& x, const Tensor& params,
                                                            std::optional<Tensor> bound, int64_t bins, bool inverse,
                                                            std::string tails, std::string parametrization,
                                                            std::vector<double> box, std::vector<double> smallest,
                                                            double logit_scale, double curve, int64_t sample_dims,
                                                            bool exact) {
  const SplineArguments how{bound,    inverse,     tails, parametrization, box,
                            smallest, logit_scale, curve, sample_dims,     exact};
  require(params.dim() > 0, "coupling: parameters need a dimension");
  return spline_forward<Backend>(x, split(params, bins), how, bins);
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> rational_quadratic_spline_backward(
    const Tensor& grad_y, const Tensor& grad_logdet, const Tensor& x, const Tensor& widths, const Tensor& heights,
    const Tensor& derivatives, std::optional<Tensor> bound, bool inverse, std::string tails,
    std::string parametrization, std::vector<double> box, std::vector<double> smallest, double logit_scale,
    double curve, int64_t sample_dims, bool exact) {
  const SplineArguments how{bound,    inverse,     tails, parametrization, box,
                            smallest, logit_scale, curve, sample_dims,     exact};
  const auto parameters = whole(widths, heights, derivatives);
  const Tensor gw = gradient_like(widths), gh = gradient_like(heights), gd = gradient_like(derivatives);
  const Tensor gx =
      spline_backward<Backend>(grad_y, grad_logdet, x, parameters, whole(gw, gh, gd), how, parameters[0].count);
  return {gx, gw, gh, gd};
}

template <class Backend>
std::tuple<Tensor, Tensor> rational_quadratic_spline_packed_backward(
    const Tensor& grad_y, const Tensor& grad_logdet, const Tensor& x, const Tensor& params, std::optional<Tensor> bound,
    int64_t bins, bool inverse, std::string tails, std::string parametrization, std::vector<double> box,
    std::vector<double> smallest, double logit_scale, double curve, int64_t sample_dims, bool exact) {
  const SplineArguments how{bound,    inverse,     tails, parametrization, box,
                            smallest, logit_scale, curve, sample_dims,     exact};
  require(params.dim() > 0, "coupling: parameters need a dimension");
  const Tensor grad = gradient_like(params);
  const Tensor gx = spline_backward<Backend>(grad_y, grad_logdet, x, split(params, bins), split(grad, bins), how, bins);
  return {gx, grad};
}

}  // namespace pyperf::coupling

// Registers every spline operator for one dispatch key.
#define PYPERF_IMPLEMENT_SPLINES(m, Backend)                                                              \
  m.impl("rational_quadratic_spline", TORCH_BOX((pyperf::coupling::rational_quadratic_spline<Backend>))); \
  m.impl("rational_quadratic_spline_packed",                                                              \
         TORCH_BOX((pyperf::coupling::rational_quadratic_spline_packed<Backend>)));                       \
  m.impl("rational_quadratic_spline_backward",                                                            \
         TORCH_BOX((pyperf::coupling::rational_quadratic_spline_backward<Backend>)));                     \
  m.impl("rational_quadratic_spline_packed_backward",                                                     \
         TORCH_BOX((pyperf::coupling::rational_quadratic_spline_packed_backward<Backend>)))
