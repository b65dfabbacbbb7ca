// Steps of samplers between torch and kernels/: checks, outputs, and how operands lie. A backend offers
//   static void step(StepCall&, const Tensor& like)
//   static void step_backward(StepCall&, const StepGradients&, const Tensor& like)
//   static void adjustments(const AdjustmentCall&, const Tensor& like)
//   static void noise(StepCall&, const Tensor& out)    out alone, of StepCall its shape and where noise comes from
//   static constexpr bool kDraws                       whether it has the numbers of PyTorch's generator
// Schemas are in sampler.cpp.
#pragma once

#include <limits>
#include <optional>
#include <tuple>

#include "../kernels/math/sampler_call.h"
#include "common/tensor.h"

namespace pyperf::sampler {

using MaybeTensor = std::optional<Tensor>;

// What is not a tensor, in the order of the schemas.
struct StepStatics {
  int64_t row;
  double guidance_scale, low, high;
  int64_t offset, copies;
};

// Numbers that are not differentiated: the table, and those of samples.
struct StepNumbers {
  const Tensor& table;
  const MaybeTensor &step, &guidance, &key, &state, &adjust;
};

// The shape of a sample tensor and the order of its dimensions in memory: those that index samples lead. Noise goes by
// the logical index of an element, so tensors that get some lie in the logical order.
class SampleShape {
 public:
  SampleShape(const Tensor& x, int64_t sample_dims, bool logical)
      : sizes_(sizes_of(x, x.dim())), sample_dims_(sample_dims) {
    require(sample_dims >= 0 && sample_dims <= x.dim(), "sampler_step: sample_dims must be in [0, ", x.dim(), "], got ",
            sample_dims);
    layout_.resize(sizes_.size());
    std::iota(layout_.begin(), layout_.end(), int64_t(0));
    std::stable_sort(layout_.begin() + sample_dims, layout_.end(),
                     [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
    if (logical || !is_dense(x)) std::iota(layout_.begin(), layout_.end(), int64_t(0));
    for (int64_t d = 0; d < x.dim(); ++d) (d < sample_dims ? samples : size) *= sizes_[d];
  }

  int64_t samples = 1, size = 1;

  int64_t group() const { return sample_dims_ ? sizes_[sample_dims_ - 1] : 1; }

  Tensor output(const Tensor& like, ScalarType dtype) const { return empty(like, sizes_, layout_, dtype); }
  // [..., copies, samples of a group, sample]
  Tensor model_inputs(const Tensor& like, int64_t copies, ScalarType dtype) const {
    const int64_t at = std::max<int64_t>(sample_dims_ - 1, 0);
    std::vector<int64_t> sizes = sizes_, layout = layout_;
    sizes.insert(sizes.begin() + at, copies);
    for (int64_t& d : layout) d += d >= at;
    layout.insert(layout.begin() + at, at);
    return empty(like, sizes, layout, dtype);
  }

  bool matches(const Tensor& t) const {
    return std::equal(t.sizes().begin(), t.sizes().end(), sizes_.begin(), sizes_.end());
  }
  // `t` itself, or a copy that lies as a kernel wants it.
  Tensor arranged(const Tensor& t) const {
    if (is_dense(t) && sample_stride(t) >= 0) return t;
    Tensor copy = output(t, t.scalar_type());
    copy_(copy, t);
    return copy;
  }
  Elements elements(const Tensor& t) const { return {t.data_ptr(), sample_stride(t)}; }

 private:
  std::vector<int64_t> sizes_, layout_;
  int64_t sample_dims_;

  bool is_dense(const Tensor& t) const {
    int64_t expected = 1;
    for (int64_t i = t.dim() - 1; i >= sample_dims_; --i) {
      const int64_t d = layout_[i];
      if (sizes_[d] != 1 && t.stride(d) != expected) return false;
      expected *= sizes_[d];
    }
    return true;
  }
  // From one sample to the next; -1 where that is not one number.
  int64_t sample_stride(const Tensor& t) const {
    int64_t stride = -1, next = 0;
    for (int64_t d = sample_dims_ - 1; d >= 0; --d) {
      if (sizes_[d] == 1) continue;
      if (stride < 0)
        stride = t.stride(d);
      else if (t.stride(d) != next)
        return -1;
      next = t.stride(d) * sizes_[d];
    }
    return std::max<int64_t>(stride, 0);
  }
};

inline bool is_half(const Tensor& t) { return storage_bytes(storage_of(t)) == 2; }

// Of `width` numbers a sample: the values and how many samples have some of their own.
template <class T>
std::tuple<const T*, int64_t> numbers(const char* what, const MaybeTensor& t, const Tensor& x, const SampleShape& shape,
                                      ScalarType dtype, int64_t width = 1) {
  if (!t) return {nullptr, 1};
  const int64_t count = t->numel() / width;
  require(t->scalar_type() == dtype && t->device() == x.device() && t->is_contiguous() && count * width == t->numel() &&
              (shape.samples == 0 || (count > 0 && shape.samples % count == 0)),
          "sampler_step: ", what, " must be contiguous, on x's device, for all samples or one for each");
  return {static_cast<const T*>(t->data_ptr()), count};
}

template <class Backend>
void require_one_source(const char* name, const MaybeTensor& noise, const MaybeTensor& key, const MaybeTensor& state) {
  require(int(noise.has_value()) + int(key.has_value()) + int(state.has_value()) <= 1 && (Backend::kDraws || !state),
          name, ": noise, key and state exclude each other, and state is for CUDA");
}

inline bool is_on_cpu(const Tensor& t) { return t.device().type() == torch::headeronly::DeviceType::CPU; }

inline void set_noise(StepCall& call, const Tensor& x, const SampleShape& shape, const MaybeTensor& key,
                      const MaybeTensor& state, int64_t offset) {
  std::tie(call.key, call.keys) = numbers<int64_t>("key", key, x, shape, ScalarType::Long);
  call.draws = state.has_value();
  if (!state) return;
  require(state->scalar_type() == ScalarType::Long && state->is_contiguous() && state->numel() == 2 &&
              (is_on_cpu(*state) || state->device() == x.device()),
          "sampler_step: state must be int64 [2], on a CPU or on x's device");
  const int64_t* const seed_and_offset = static_cast<const int64_t*>(state->data_ptr());
  call.offset = uint64_t(offset);
  if (is_on_cpu(*state))
    call.seed = uint64_t(seed_and_offset[0]), call.offset += uint64_t(seed_and_offset[1]);
  else
    call.state = seed_and_offset;
}

// Everything but the operands.
inline StepCall call_of(const Tensor& x, ScalarType output_type, const SampleShape& shape, const StepNumbers& of,
                        const StepStatics& statics) {
  const Tensor& table = of.table;
  require(table.dim() == 2 && table.size(1) == kColumns && table.size(0) > 0 && table.is_contiguous() &&
              table.scalar_type() == ScalarType::Double && table.device() == x.device(),
          "sampler_step: table must be float64 [rows, ", int(kColumns), "], contiguous, on x's device");
  require(statics.copies >= 0, "sampler_step: copies must be >= 0, got ", statics.copies);
  StepCall call{};
  call.type = storage_of(x);
  switch (output_type) {
    case ScalarType::Half: call.output_type = Storage::f16; break;
    case ScalarType::BFloat16: call.output_type = Storage::bf16; break;
    default: call.output_type = call.type;
  }
  call.samples = shape.samples, call.sample_size = shape.size;
  call.copies = statics.copies, call.group = std::max<int64_t>(shape.group(), 1);
  call.table = static_cast<const double*>(table.data_ptr()), call.rows = table.size(0);
  std::tie(call.step, call.steps) = numbers<int64_t>("step", of.step, x, shape, ScalarType::Long);
  std::tie(call.guidance, call.guidances) = numbers<double>("guidance", of.guidance, x, shape, ScalarType::Double);
  std::tie(call.adjust, call.adjusts) = numbers<double>("adjust", of.adjust, x, shape, ScalarType::Double, 2);
  call.row = statics.row, call.guidance_scale = statics.guidance_scale;
  call.low = statics.low, call.high = statics.high;
  set_noise(call, x, shape, of.key, of.state, statics.offset);
  return call;
}

// Samples that are treated alike and lie one behind the other are one.
inline void merge_samples(StepCall& call, StepGradients* grads = nullptr) {
  const bool one_group = call.group == call.samples || call.copies <= 1;
  if (call.samples <= 1 || call.steps > 1 || call.guidances > 1 || call.adjusts > 1 || call.key || !one_group) return;
  const auto dense = [&](const Elements& e) { return !e.data || e.stride == call.sample_size; };
  if (call.log_prob || call.score.data) return;
  for (int k = 0; k < kOperands; ++k)
    if (k != kModelInput && !dense(call.operand[k])) return;
  if (grads) {
    for (int k = 0; k < kOutputs; ++k)
      if (k != kModelInput - kInputs && !dense(grads->of_output[k])) return;
    for (const Elements& e : grads->of_input)
      if (!dense(e)) return;
  }
  call.sample_size *= call.samples;
  call.samples = call.group = 1;
}

inline void check_dtypes(const Tensor& x, const Tensor& output) {
  require(output.scalar_type() == x.scalar_type() || (storage_of(x) == Storage::f32 && is_half(output)),
          "sampler_step: output must have x's dtype, or 16 bits for a float32 x");
}

// The operands of a call, and the copies that some of them needed.
class Operands {
 public:
  Operands(const Tensor& x, const SampleShape& shape) : x_(x), shape_(shape) {}

  Elements input(const char* what, const MaybeTensor& t, ScalarType dtype) {
    if (!t) return {};
    require(shape_.matches(*t) && t->scalar_type() == dtype && t->device() == x_.device(), "sampler_step: ", what,
            " must have the shape and device of x and the dtype of its kind");
    held_.push_back(shape_.arranged(*t));
    return shape_.elements(held_.back());
  }

 private:
  const Tensor& x_;
  const SampleShape& shape_;
  std::vector<Tensor> held_;
};

inline Tensor nothing(const Tensor& like, ScalarType dtype) { return empty(like, {0}, {0}, dtype); }

struct StepInputs {
  const Tensor &x, &output;
  const MaybeTensor &unconditional, &variance, &h1, &h2, &h3, &last, &noise;
};
struct StepOutputs {
  bool next, denoised, keeps;
};

// Ready but for what belongs to a transition.
struct PreparedStep {
  SampleShape shape;
  StepCall call;
  Operands of;
  Tensor next, denoised, kept, corrected, model_input;

  PreparedStep(const StepInputs& in, const StepNumbers& numbers, const StepStatics& statics, const StepOutputs& wanted,
               int64_t sample_dims)
      : shape(in.x, sample_dims, numbers.key || numbers.state),
        call(call_of(in.x, in.output.scalar_type(), shape, numbers, statics)),
        of(in.x, shape) {
    check_dtypes(in.x, in.output);
    const ScalarType type = in.x.scalar_type(), model_type = in.output.scalar_type();
    call.guided = in.unconditional.has_value(), call.corrects = in.last.has_value();
    const auto made = [&](bool wanted) { return wanted ? shape.output(in.x, type) : nothing(in.x, type); };
    next = made(wanted.next), denoised = made(wanted.denoised), kept = made(wanted.keeps);
    corrected = made(call.corrects);
    model_input = statics.copies ? shape.model_inputs(in.x, statics.copies, model_type) : nothing(in.x, model_type);
    call.operand[kSample] = of.input("x", in.x, type);
    call.operand[kOutput] = of.input("output", in.output, model_type);
    call.operand[kUnconditional] = of.input("unconditional", in.unconditional, model_type);
    call.operand[kVariance] = of.input("variance", in.variance, model_type);
    call.operand[kHistory1] = of.input("h1", in.h1, type);
    call.operand[kHistory2] = of.input("h2", in.h2, type);
    call.operand[kHistory3] = of.input("h3", in.h3, type);
    call.operand[kLast] = of.input("last", in.last, type);
    call.operand[kNoise] = of.input("noise", in.noise, type);
    if (wanted.next) call.operand[kNext] = shape.elements(next);
    if (wanted.denoised) call.operand[kDenoised] = shape.elements(denoised);
    if (wanted.keeps) call.operand[kKept] = shape.elements(kept);
    if (call.corrects) call.operand[kCorrected] = shape.elements(corrected);
    if (statics.copies) call.operand[kModelInput].data = model_input.data_ptr();
  }
};

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> step(
    const Tensor& x, const Tensor& output, const MaybeTensor& unconditional, const MaybeTensor& variance,
    const MaybeTensor& h1, const MaybeTensor& h2, const MaybeTensor& h3, const MaybeTensor& last,
    const MaybeTensor& noise, const Tensor& table, const MaybeTensor& steps, const MaybeTensor& guidance,
    const MaybeTensor& key, const MaybeTensor& state, const MaybeTensor& adjust, int64_t row, double guidance_scale,
    double low, double high, int64_t offset, bool denoised, bool keeps, int64_t copies, int64_t sample_dims) {
  require_one_source<Backend>("sampler_step", noise, key, state);
  PreparedStep p({x, output, unconditional, variance, h1, h2, h3, last, noise},
                 {table, steps, guidance, key, state, adjust}, {row, guidance_scale, low, high, offset, copies},
                 {true, denoised, keeps}, sample_dims);
  merge_samples(p.call);
  if (x.numel()) Backend::step(p.call, x);
  return {p.next, p.denoised, p.kept, p.corrected, p.model_input};
}

inline ScalarType log_prob_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> transition(
    const Tensor& x, const Tensor& output, const MaybeTensor& unconditional, const MaybeTensor& variance,
    const MaybeTensor& h1, const MaybeTensor& h2, const MaybeTensor& h3, const MaybeTensor& last,
    const MaybeTensor& noise, const MaybeTensor& target, const Tensor& table, const MaybeTensor& steps,
    const MaybeTensor& guidance, const MaybeTensor& key, const MaybeTensor& state, const MaybeTensor& adjust,
    int64_t row, double guidance_scale, double low, double high, int64_t offset, bool denoised, bool keeps,
    int64_t copies, bool score, int64_t sample_dims) {
  // A sum over a sample wants its elements side by side, and a generator's numbers lie all over the samples.
  require(!state && int(noise.has_value()) + int(key.has_value()) + int(target.has_value()) == 1,
          "sampler_transition: needs one of noise, key and target, and no state");
  require(!target || copies == 0, "sampler_transition: an input of the model is made of a new sample, not of a target");
  PreparedStep p({x, output, unconditional, variance, h1, h2, h3, last, noise},
                 {table, steps, guidance, key, state, adjust}, {row, guidance_scale, low, high, offset, copies},
                 {!target, denoised, keeps}, sample_dims);
  const ScalarType type = log_prob_type(x);
  std::vector<int64_t> lead = sizes_of(x, sample_dims);
  const Tensor log_prob = contiguous_empty(x, lead, type);
  const Tensor scores = score ? p.shape.output(x, type) : nothing(x, type);
  p.call.log_prob = log_prob.data_ptr();
  p.call.target = p.of.input("target", target, x.scalar_type());
  if (score) p.call.score = p.shape.elements(scores);
  if (x.numel())
    Backend::step(p.call, x);
  else
    fill_(log_prob, 0.0);
  return {p.next, p.denoised, p.kept, p.corrected, p.model_input, log_prob, scores};
}

// next: whether grad_next counts. wanted: bits of the inputs, in their order. Values of x, output, unconditional are
// needed where low or high are finite, those of variance and noise where the variance was learned.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> step_backward(
    const Tensor& grad_next, const Tensor& grad_denoised, const Tensor& grad_kept, const Tensor& grad_corrected,
    const Tensor& grad_model_input, const MaybeTensor& x, const MaybeTensor& output, const MaybeTensor& unconditional,
    const MaybeTensor& variance, const MaybeTensor& noise, const MaybeTensor& grad_log_prob, const MaybeTensor& score,
    const Tensor& table, const MaybeTensor& steps, const MaybeTensor& guidance, const MaybeTensor& key,
    const MaybeTensor& state, int64_t row, double guidance_scale, double low, double high, int64_t offset, bool guided,
    bool next, bool denoised, bool keeps, bool corrects, int64_t copies, int64_t wanted, int64_t sample_dims) {
  check_dtypes(grad_next, grad_model_input);
  for (const Tensor* grad : {&grad_denoised, &grad_kept, &grad_corrected, &grad_model_input})
    require(grad->device() == grad_next.device(), "sampler_step_backward: gradients must be on one device");
  const ScalarType type = grad_next.scalar_type(), model_type = grad_model_input.scalar_type();
  require_one_source<Backend>("sampler_step_backward", noise, key, state);
  const SampleShape shape(grad_next, sample_dims, key || state);
  StepCall call = call_of(grad_next, model_type, shape, {table, steps, guidance, key, state, {}},
                          {row, guidance_scale, low, high, offset, copies});
  call.guided = guided, call.corrects = corrects;
  require(!call.clips() || (x && output && unconditional.has_value() == guided),
          "sampler_step_backward: a clip needs x, output and unconditional");
  const auto wants = [&](int k) { return (wanted >> k & 1) != 0; };
  const bool learned = wants(kVariance) || (variance && wants(kNoise));
  require(!wants(kLast) || corrects, "sampler_step_backward: last has a gradient where there was a correction");
  require(!learned || (variance && (noise || key || state || score)),
          "sampler_step_backward: a learned variance needs variance and noise");
  const ScalarType sum_type = log_prob_type(grad_next);
  require(grad_log_prob.has_value() == score.has_value() &&
              (!score || (grad_log_prob->scalar_type() == sum_type && grad_log_prob->numel() == shape.samples &&
                          grad_log_prob->device() == grad_next.device())),
          "sampler_step_backward: a score needs the gradients of the log-probabilities, one a sample");
  const auto contiguous = [](const Tensor& t) {
    if (t.is_contiguous()) return t;
    Tensor copy = contiguous_empty(t, sizes_of(t, t.dim()), t.scalar_type());
    copy_(copy, t);
    return copy;
  };
  MaybeTensor of_log_prob;
  if (score) of_log_prob.emplace(contiguous(*grad_log_prob));
  Operands of(grad_next, shape);
  StepGradients grads{};
  if (next) grads.of_output[kNext - kInputs] = of.input("grad_next", grad_next, type);
  call.score = of.input("score", score, sum_type);
  if (score) grads.of_log_prob = of_log_prob->data_ptr();
  if (denoised) grads.of_output[kDenoised - kInputs] = of.input("grad_denoised", grad_denoised, type);
  if (keeps) grads.of_output[kKept - kInputs] = of.input("grad_kept", grad_kept, type);
  if (corrects) grads.of_output[kCorrected - kInputs] = of.input("grad_corrected", grad_corrected, type);
  Tensor laid;
  if (copies) {
    laid = shape.model_inputs(grad_next, copies, model_type);
    require(std::equal(laid.sizes().begin(), laid.sizes().end(), grad_model_input.sizes().begin(),
                       grad_model_input.sizes().end()),
            "sampler_step_backward: grad_model_input has another shape than the input of the model");
    if (std::equal(laid.strides().begin(), laid.strides().end(), grad_model_input.strides().begin()))
      laid = grad_model_input;
    else
      copy_(laid, grad_model_input);
    grads.of_output[kModelInput - kInputs].data = laid.data_ptr();
  }
  call.operand[kSample] = of.input("x", x, type);
  call.operand[kOutput] = of.input("output", output, model_type);
  call.operand[kUnconditional] = of.input("unconditional", unconditional, model_type);
  call.operand[kVariance] = of.input("variance", variance, model_type);
  call.operand[kNoise] = of.input("noise", noise, type);
  std::array<Tensor, kInputs> made;
  for (int k = 0; k < kInputs; ++k) {
    const ScalarType dtype = k == kOutput || k == kUnconditional || k == kVariance ? model_type : type;
    made[k] = wants(k) ? shape.output(grad_next, dtype) : nothing(grad_next, dtype);
    if (wants(k)) grads.of_input[k] = shape.elements(made[k]);
  }
  merge_samples(call, &grads);
  if (grad_next.numel()) Backend::step_backward(call, grads, grad_next);
  return {made[0], made[1], made[2], made[3], made[4], made[5], made[6], made[7], made[8]};
}

template <class Backend>
Tensor adjustments(const Tensor& x, const Tensor& output, const MaybeTensor& unconditional, const Tensor& table,
                   const MaybeTensor& steps, const MaybeTensor& guidance, int64_t row, double guidance_scale,
                   double rescale, double quantile, double largest, int64_t sample_dims) {
  check_dtypes(x, output);
  require(quantile >= 0 && quantile <= 1, "sampler_adjustments: quantile must be in [0, 1], got ", quantile);
  const SampleShape shape(x, sample_dims, false);
  constexpr double kInfinity = std::numeric_limits<double>::infinity(), kNaN = std::numeric_limits<double>::quiet_NaN();
  AdjustmentCall call{};
  call.step = call_of(x, output.scalar_type(), shape, {table, steps, guidance, {}, {}, {}},
                      {row, guidance_scale, -kInfinity, kInfinity, 0, 0});
  Operands of(x, shape);
  call.step.operand[kSample] = of.input("x", x, x.scalar_type());
  call.step.operand[kOutput] = of.input("output", output, output.scalar_type());
  call.step.operand[kUnconditional] = of.input("unconditional", unconditional, output.scalar_type());
  call.rescale = rescale, call.quantile = quantile, call.largest = largest;
  const Tensor memory =
      contiguous_empty(x, {quantile != 0 ? x.numel() : 0}, is_half(x) ? ScalarType::Float : ScalarType::Double);
  const Tensor out = contiguous_empty(x, {shape.samples, 2}, ScalarType::Double);
  call.memory = memory.data_ptr(), call.out = static_cast<double*>(out.data_ptr());
  x.numel() ? Backend::adjustments(call, x) : void(fill_(out, kNaN));
  return out;
}

// Noise in the logical order of its elements: from keys that of a row, which may be below 0, else that of a generator.
template <class Backend>
Tensor noise(const Tensor& like, const MaybeTensor& key, const MaybeTensor& state, int64_t draw, int64_t offset,
             int64_t sample_dims) {
  require(key.has_value() != state.has_value() && (Backend::kDraws || !state),
          "sampler_noise: needs a key, or a state on CUDA");
  const SampleShape shape(like, sample_dims, true);
  const Tensor out = shape.output(like, like.scalar_type());
  StepCall call{};
  call.type = call.output_type = storage_of(like);
  call.samples = shape.samples, call.sample_size = shape.size;
  call.row = draw;
  set_noise(call, like, shape, key, state, offset);
  call.operand[kNext] = shape.elements(out);
  if (out.numel()) Backend::noise(call, out);
  return out;
}

}  // namespace pyperf::sampler

#define PYPERF_IMPLEMENT_SAMPLER(m, Backend)                                        \
  m.impl("sampler_noise", TORCH_BOX(&pyperf::sampler::noise<Backend>));             \
  m.impl("sampler_adjustments", TORCH_BOX(&pyperf::sampler::adjustments<Backend>)); \
  m.impl("sampler_step", TORCH_BOX(&pyperf::sampler::step<Backend>));               \
  m.impl("sampler_transition", TORCH_BOX(&pyperf::sampler::transition<Backend>));   \
  m.impl("sampler_step_backward", TORCH_BOX(&pyperf::sampler::step_backward<Backend>))
