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
  std::optional<Tensor> bound, mask;  // of each element
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
  const int64_t bytes = before.count * before.stride() * storage_bytes(storage_of(*before.of));
  if (static_cast<char*>(before.data()) + bytes != after.data()) return false;
  const auto one = before.of->strides(), other = after.of->strides();
  return before.of == after.of || std::equal(one.begin(), one.end(), other.begin(), other.end());
}

// Tensors of one call. Forward: no gradients, logdet is a result. Backward: logdet is its gradient.
struct SplineTensors {
  Tensor x;
  std::array<Parameters, 3> parameters;  // widths, heights, derivatives; of size 1 where elements share them
  std::array<Parameters, 3> gradients;   // of them; only in a backward in which each element has its own
  const Tensor *grad_y = nullptr, *bound = nullptr, *mask = nullptr;
  Tensor logdet, result;
  std::optional<Tensor> shared;  // double, [*sizes of the parameters]: sums of gradients
  OtherChannels others{};
  bool backward = false;
};

inline void check_parameters(const Tensor& x, const std::array<Parameters, 3>& parameters,
                             const std::array<int64_t, 3>& counts) {
  const Tensor& first = *parameters[0].of;
  storage_of(first);  // refuses other dtypes
  for (int k = 0; k < 3; ++k) {
    const Parameters& p = parameters[k];
    require(p.of->dim() == x.dim() + 1, "coupling: parameters must have the dimensions of x and one more");
    for (int64_t d = 0; d < x.dim(); ++d)
      require((p.of->size(d) == x.size(d) || p.of->size(d) == 1) && p.of->size(d) == first.size(d),
              "coupling: parameters must have one shape, that of x or 1 in its place, and one more dimension");
    require(p.first >= 0 && p.count == counts[k] && p.first + p.count <= p.of->size(x.dim()),
            "coupling: unexpected number of parameters");
    require(p.of->device() == x.device(), "coupling: tensors must be on one device");
    require(p.of->scalar_type() == first.scalar_type(),
            "coupling: widths, heights and derivatives must have one dtype");
  }
}

inline void check_shape(const char* what, const Tensor& t, const Tensor& x, int64_t dims) {
  require(t.dim() == dims && std::equal(t.sizes().begin(), t.sizes().end(), x.sizes().begin()), "coupling: ", what,
          " has another shape than its companion");
  require(t.device() == x.device(), "coupling: tensors must be on one device");
}

inline void check_arguments(const Tensor& x, const SplineArguments& how) {
  require(how.sample_dims >= -1 && how.sample_dims <= x.dim(), "coupling: sample_dims out of range");
  if (how.bound) {
    check_shape("bound", *how.bound, x, x.dim());
    require(how.bound->scalar_type() == logdet_type(x), "coupling: bound must have the dtype of log-dets");
  }
  if (how.mask) {
    check_shape("mask", *how.mask, x, x.dim());
    require(how.mask->scalar_type() == ScalarType::Bool, "coupling: mask must be bool");
  }
}

// Whether elements share parameters along a dimension of x.
inline bool share(const Tensor& x, const Tensor& parameters, int64_t d) {
  return parameters.size(d) == 1 && x.size(d) != 1;
}
inline bool share(const Tensor& x, const Tensor& parameters) {
  for (int64_t d = 0; d < x.dim(); ++d)
    if (share(x, parameters, d)) return true;
  return false;
}

// ---- elements ----

// The dimensions of x in the order in which elements are walked; the first ones are those of samples.
struct SplineOrder {
  std::vector<int64_t> dims, sizes;
  int64_t sample_dims;

  SplineOrder(const SplineTensors& t, int64_t summed_behind) : sample_dims(std::max<int64_t>(summed_behind, 0)) {
    for (int64_t d = 0; d < t.x.dim(); ++d) dims.push_back(d);
    if (t.shared) {
      const auto own = [&](int64_t d) { return !share(t.x, *t.parameters[0].of, d); };
      sample_dims = std::stable_partition(dims.begin(), dims.end(), own) - dims.begin();
    }
    for (int64_t d : dims) sizes.push_back(t.x.size(d));
  }
  // Of what is repeated along dimensions in which it has size 1, or which it does not have.
  std::vector<int64_t> strides(const Tensor& t) const {
    const auto own_sizes = t.sizes(), own_strides = t.strides();
    std::vector<int64_t> of;
    of.reserve(dims.size());
    for (int64_t d : dims) of.push_back(d >= int64_t(own_sizes.size()) || own_sizes[d] == 1 ? 0 : own_strides[d]);
    return of;
  }
};

// False as below.
inline bool walk_apart(const Tensor* t, const SplineOrder& order, const Tensor& result, Aside& aside) {
  aside.data = nullptr;
  if (!t) return true;
  const auto own = order.strides(*t), of_result = order.strides(result);
  const ElementRuns<2> runs(order.sizes.data(), int64_t(order.sizes.size()), {own.data(), of_result.data()},
                            order.sample_dims);
  if (!runs.fits) return false;
  aside.rows.count = runs.rows.count, aside.rows.dims = runs.rows.dims;
  for (int d = 0; d < runs.rows.dims; ++d) {
    aside.rows.size[d] = runs.rows.size[d];
    aside.rows.stride[0][d] = runs.rows.stride[0][d];
  }
  aside.n = runs.n, aside.stride = runs.stride[0];
  aside.data = t->data_ptr();
  return true;
}

// False where the tensors' dimensions cannot be walked as they are.
inline bool spline_elements(const SplineTensors& t, int64_t sample_dims, SplineElements& e) {
  const Tensor& x = t.x;
  const SplineOrder order(t, sample_dims);
  const bool own_gradients = t.backward && !t.shared;
  e.summed = sample_dims >= 0 && !t.shared;
  e.others = t.others;
  e.shared = t.shared ? static_cast<double*>(t.shared->data_ptr()) : nullptr;
  std::array<const Tensor*, kSplineOperands> operands{};
  operands.fill(&t.result);
  operands[kInput] = &x;
  for (int k = 0; k < 3; ++k) {
    operands[kWidths + k] = t.parameters[k].of;
    if (own_gradients) operands[kGradWidths + k] = t.gradients[k].of;
  }
  if (t.backward) operands[kGradOutput] = t.grad_y;
  if (!e.summed) operands[kLogdet] = &t.logdet;
  std::array<std::vector<int64_t>, kSplineOperands> strides;
  std::array<const int64_t*, kSplineOperands> starts{};
  for (int k = 0; k < kSplineOperands; ++k) {
    strides[k] = order.strides(operands[k]->numel() == 0 ? t.result : *operands[k]);  // one bin has no derivatives
    starts[k] = strides[k].data();
  }
  const ElementRuns<kSplineOperands> runs(order.sizes.data(), x.dim(), starts, order.sample_dims);
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
    if (!own_gradients) continue;
    e.data[kGradWidths + k] = t.gradients[k].data();
    e.parameter_stride[kGradWidths + k] = t.gradients[k].stride();
  }
  e.packed = follows(t.parameters[1], t.parameters[0]) && follows(t.parameters[2], t.parameters[1]);
  if (t.backward) e.data[kGradOutput] = t.grad_y->data_ptr();
  if (own_gradients)
    e.grads_packed = follows(t.gradients[1], t.gradients[0]) && follows(t.gradients[2], t.gradients[1]);
  (e.summed ? e.sample_logdet : e.data[kLogdet]) = t.logdet.data_ptr();
  return walk_apart(t.bound, order, t.result, e.bounds) && walk_apart(t.mask, order, t.result, e.mask);
}

inline bool is_wide(const Tensor& x, const std::array<Parameters, 3>& parameters, const SplineArguments& how) {
  return how.exact || x.scalar_type() == ScalarType::Double || parameters[0].of->scalar_type() == ScalarType::Double;
}

template <class Backend, bool kBackward>
bool run_spline(const SplineTensors& t, const SplineArguments& how, int64_t bins) {
  SplineElements e{};
  if (!spline_elements(t, how.sample_dims, e)) return false;
  if (is_wide(t.x, t.parameters, how))
    Backend::template spline<kBackward>(e, how.spline<double>(bins), t.x);
  else
    Backend::template spline<kBackward>(e, how.spline<float>(bins), t.x);
  return true;
}

// ---- operators ----

// The same arguments with copies of the tensors, which can always be walked.
inline SplineArguments copied(SplineArguments how) {
  if (how.bound) how.bound = contiguous(*how.bound);
  if (how.mask) how.mask = contiguous(*how.mask);
  return how;
}
// The same parameters as views or copies that stay in `tensors`, made by `made(tensor)`; of packed ones there is one.
template <class Make>
std::array<Parameters, 3> made_anew(std::array<Parameters, 3> parameters, std::array<Tensor, 3>& tensors,
                                    const Make& made) {
  const Tensor* const first = parameters[0].of;
  for (int k = 0; k < 3; ++k) {
    const bool packed = k > 0 && parameters[k].of == first;
    if (!packed) tensors[k] = made(*parameters[k].of);
    parameters[k].of = &tensors[packed ? 0 : k];
  }
  return parameters;
}
// Those of every element, as views.
inline std::array<Parameters, 3> of_elements(const Tensor& x, const std::array<Parameters, 3>& parameters,
                                             std::array<Tensor, 3>& tensors) {
  return made_anew(parameters, tensors, [&](const Tensor& t) {
    std::vector<int64_t> sizes = sizes_of(x, x.dim());
    sizes.push_back(t.size(x.dim()));
    return expanded(t, sizes);
  });
}
inline std::array<Parameters, 3> copied(const std::array<Parameters, 3>& parameters, std::array<Tensor, 3>& copies) {
  return made_anew(parameters, copies, [](const Tensor& t) { return contiguous(t); });
}

inline SplineTensors checked_tensors(const Tensor& x, const std::array<Parameters, 3>& parameters,
                                     const SplineArguments& how, int64_t bins) {
  check_parameters(x, parameters, {bins, bins, how.spline<double>(bins).derivatives()});
  check_arguments(x, how);
  SplineTensors t;
  t.x = x;
  t.parameters = parameters;
  t.bound = how.bound ? &*how.bound : nullptr;
  t.mask = how.mask ? &*how.mask : nullptr;
  return t;
}

// Fills y and the log-det of x.
template <class Backend>
void spline_forward(const Tensor& x, const std::array<Parameters, 3>& parameters, const SplineArguments& how,
                    int64_t bins, Tensor y, Tensor logdet, const OtherChannels& others) {
  SplineTensors t = checked_tensors(x, parameters, how, bins);
  t.result = y, t.logdet = logdet;
  t.others = others;
  if (run_spline<Backend, false>(t, how, bins)) return;
  std::array<Tensor, 3> views, copies;
  const Tensor dense_y = contiguous(y), dense_logdet = contiguous(logdet);
  spline_forward<Backend>(contiguous(x), copied(of_elements(x, parameters, views), copies), copied(how), bins, dense_y,
                          dense_logdet, others);
  copy_(y, dense_y);
  copy_(logdet, dense_logdet);
}

template <class Backend>
std::tuple<Tensor, Tensor> spline_forward(const Tensor& x, const std::array<Parameters, 3>& parameters,
                                          const SplineArguments& how, int64_t bins, const Split& split) {
  require(how.sample_dims >= -1 && how.sample_dims <= x.dim(), "coupling: sample_dims out of range");
  const auto [y, logdet] = empty_outputs(x, split, how.sample_dims);
  const OtherChannels others = split.copy_or_plan_others<Backend>(x, y);
  spline_forward<Backend>(split.view_of(x), parameters, how, bins, split.view_of(y), logdet, others);
  return {y, logdet};
}

inline std::array<Parameters, 3> apart(const Tensor& packed, int64_t bins) {
  require(packed.dim() > 0, "coupling: parameters need a dimension");
  return {Parameters{&packed, 0, bins}, Parameters{&packed, bins, bins},
          Parameters{&packed, 2 * bins, packed.size(packed.dim() - 1) - 2 * bins}};
}

// Fills the gradients of x, and of the parameters into `gradients`.
template <class Backend>
void spline_backward(const Tensor& grad_y, const Tensor& grad_logdet, const Tensor& x,
                     const std::array<Parameters, 3>& parameters, const std::array<Parameters, 3>& gradients,
                     const SplineArguments& how, int64_t bins, Tensor grad_x, const OtherChannels& others);

// The same for parameters that elements share.
template <class Backend>
void shared_spline_backward(SplineTensors t, const std::array<Parameters, 3>& gradients, const SplineArguments& how,
                            int64_t bins) {
  constexpr int64_t kFewestElements = 16;  // of a set of parameters; fewer are faster with gradients of their own
  const Tensor &x = t.x, &first = *t.parameters[0].of;
  std::vector<int64_t> sizes = sizes_of(first, x.dim()), every = sizes_of(x, x.dim()), shared;
  int64_t sets = 1;
  for (int64_t d = 0; d < x.dim(); ++d) {
    sets *= first.size(d);
    if (share(x, first, d)) shared.push_back(d);
  }
  const int64_t count = t.parameters[0].count + t.parameters[1].count + t.parameters[2].count;
  sizes.push_back(count), every.push_back(count);
  // Gradients may pass through memory that has the dtype of the parameters, so that is the arithmetic's.
  const ScalarType type = is_wide(x, t.parameters, how) ? ScalarType::Double : ScalarType::Float;
  std::array<Tensor, 3> wide, views;
  const auto parameters = made_anew(t.parameters, wide, [&](const Tensor& p) {
    Tensor copy = contiguous_empty(p, sizes_of(p, p.dim()), type);
    copy_(copy, p);
    return copy;
  });
  t.shared = contiguous_empty(x, sizes, ScalarType::Double);
  t.parameters = parameters;
  if (x.numel() == 0) {
    fill_(*t.shared, 0);
  } else if (x.numel() < sets * kFewestElements || !run_spline<Backend, true>(t, how, bins)) {
    const Tensor each = contiguous_empty(x, every, type);
    spline_backward<Backend>(*t.grad_y, t.logdet, x, of_elements(x, parameters, views), apart(each, bins), how, bins,
                             t.result, t.others);
    t.shared = summed(each, shared, ScalarType::Double);
  }
  int64_t before = 0;
  for (int k = 0; k < 3; before += gradients[k++].count) {
    if (gradients[k].count == 0) continue;
    Tensor gradient = sliced(*gradients[k].of, x.dim(), gradients[k].first, gradients[k].first + gradients[k].count);
    copy_(gradient, sliced(*t.shared, x.dim(), before, before + gradients[k].count));
  }
}

template <class Backend>
void spline_backward(const Tensor& grad_y, const Tensor& grad_logdet, const Tensor& x,
                     const std::array<Parameters, 3>& parameters, const std::array<Parameters, 3>& gradients,
                     const SplineArguments& how, int64_t bins, Tensor grad_x, const OtherChannels& others) {
  SplineTensors t = checked_tensors(x, parameters, how, bins);
  check_shape("grad_y", grad_y, x, x.dim());
  check_shape("grad_logdet", grad_logdet, x, how.sample_dims < 0 ? x.dim() : how.sample_dims);
  require(grad_logdet.scalar_type() == logdet_type(x), "coupling: grad_logdet has another dtype than its companion");
  t.grad_y = &grad_y;
  t.logdet = how.sample_dims < 0 ? grad_logdet : contiguous(grad_logdet);
  t.backward = true;
  t.result = grad_x;
  t.others = others;
  if (share(x, *parameters[0].of)) return shared_spline_backward<Backend>(t, gradients, how, bins);
  t.gradients = gradients;
  if (run_spline<Backend, true>(t, how, bins)) return;
  std::array<Tensor, 3> copies, dense;
  const auto into = copied(gradients, dense);
  const Tensor dense_x = contiguous(grad_x);
  spline_backward<Backend>(contiguous(grad_y), contiguous(grad_logdet), contiguous(x), copied(parameters, copies), into,
                           copied(how), bins, dense_x, others);
  copy_(grad_x, dense_x);
  for (int k = 0; k < 3; ++k) {
    Tensor gradient = *gradients[k].of;
    if (into[k].of == &dense[k]) copy_(gradient, dense[k]);
  }
}

template <class Backend>
Tensor spline_backward(const Tensor& grad_y, const Tensor& grad_logdet, const Tensor& x,
                       const std::array<Parameters, 3>& parameters, const std::array<Parameters, 3>& gradients,
                       const SplineArguments& how, int64_t bins, const Split& split) {
  check_shape("grad_y", grad_y, x, x.dim());
  require(grad_y.scalar_type() == x.scalar_type(), "coupling: grad_y has another dtype than its companion");
  const Tensor grad_x = empty_as(x, x.scalar_type());
  const OtherChannels others = split.copy_or_plan_others<Backend>(grad_y, grad_x);
  spline_backward<Backend>(split.view_of(grad_y), grad_logdet, split.view_of(x), parameters, gradients, how, bins,
                           split.view_of(grad_x), others);
  return grad_x;
}

inline std::array<Parameters, 3> whole(const Tensor& widths, const Tensor& heights, const Tensor& derivatives) {
  const auto all = [](const Tensor& t) { return Parameters{&t, 0, t.size(t.dim() - 1)}; };
  require(widths.dim() > 0 && heights.dim() > 0 && derivatives.dim() > 0, "coupling: parameters need a dimension");
  return {all(widths), all(heights), all(derivatives)};
}

template <class Backend>
std::tuple<Tensor, Tensor> rational_quadratic_spline(const Tensor& x, const Tensor& widths, const Tensor& heights,
                                                     const Tensor& derivatives, std::optional<Tensor> bound,
                                                     std::optional<Tensor> mask, bool inverse, std::string tails,
                                                     std::string parametrization, std::vector<double> box,
                                                     std::vector<double> smallest, double logit_scale, double curve,
                                                     int64_t sample_dims, bool exact) {
  const SplineArguments how{bound,       mask,  inverse,     tails, parametrization, box, smallest,
                            logit_scale, curve, sample_dims, exact};
  const auto parameters = whole(widths, heights, derivatives);
  return spline_forward<Backend>(x, parameters, how, parameters[0].count, Split());
}

template <class Backend>
std::tuple<Tensor, Tensor> rational_quadratic_spline_packed(const Tensor& x, const Tensor& params,
                                                            std::optional<Tensor> bound, std::optional<Tensor> mask,
                                                            int64_t bins, std::optional<std::vector<int64_t>> split,
                                                            bool inverse, std::string tails,
                                                            std::string parametrization, std::vector<double> box,
                                                            std::vector<double> smallest, double logit_scale,
                                                            double curve, int64_t sample_dims, bool exact) {
  const SplineArguments how{bound,       mask,  inverse,     tails, parametrization, box, smallest,
                            logit_scale, curve, sample_dims, exact};
  return spline_forward<Backend>(x, apart(params, bins), how, bins, Split(x, params, split));
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> rational_quadratic_spline_backward(
    const Tensor& grad_y, const Tensor& grad_logdet, const Tensor& x, const Tensor& widths, const Tensor& heights,
    const Tensor& derivatives, std::optional<Tensor> bound, std::optional<Tensor> mask, bool inverse, std::string tails,
    std::string parametrization, std::vector<double> box, std::vector<double> smallest, double logit_scale,
    double curve, int64_t sample_dims, bool exact) {
  const SplineArguments how{bound,       mask,  inverse,     tails, parametrization, box, smallest,
                            logit_scale, curve, sample_dims, exact};
  const auto parameters = whole(widths, heights, derivatives);
  const ScalarType type = widths.scalar_type();
  const Tensor gw = empty_as(widths, type), gh = empty_as(heights, type), gd = empty_as(derivatives, type);
  const Tensor gx = spline_backward<Backend>(grad_y, grad_logdet, x, parameters, whole(gw, gh, gd), how,
                                             parameters[0].count, Split());
  return {gx, gw, gh, gd};
}

template <class Backend>
std::tuple<Tensor, Tensor> rational_quadratic_spline_packed_backward(
    const Tensor& grad_y, const Tensor& grad_logdet, const Tensor& x, const Tensor& params, std::optional<Tensor> bound,
    std::optional<Tensor> mask, int64_t bins, std::optional<std::vector<int64_t>> split, bool inverse,
    std::string tails, std::string parametrization, std::vector<double> box, std::vector<double> smallest,
    double logit_scale, double curve, int64_t sample_dims, bool exact) {
  const SplineArguments how{bound,       mask,  inverse,     tails, parametrization, box, smallest,
                            logit_scale, curve, sample_dims, exact};
  const Tensor grad = empty_as(params, params.scalar_type());
  const Tensor gx = spline_backward<Backend>(grad_y, grad_logdet, x, apart(params, bins), apart(grad, bins), how, bins,
                                             Split(x, params, split));
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
