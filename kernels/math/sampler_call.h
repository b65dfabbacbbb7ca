// What the kernels of a sampler's step are asked to do. Built on the host, passed to kernels by value.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/storage.h"

namespace pyperf::sampler {

// Columns of a table of coefficients, one row a call of the model:
//   D  = clip(p x + q m)                                          the denoised sample; m: the model's output, guided
//   x <- last_x last + last_d D + last_h1 h1 + last_h2 h2         where a corrector has `last`
//   x' = x_ x + m_ m + d_ D + h1_ h1 + h2_ h2 + h3_ h3 + z_ n     n: noise; with a learned variance v in [-1, 1] times
//                                                                 exp(((v + 1) log_large + (1 - v) log_small) / 4)
//   kept = keep_x x + keep_m m + keep_d D                         history of the next steps
//   input x'                                                      what the model sees next
enum Column : int {
  kP,
  kQ,
  kX,
  kM,
  kD,
  kH1,
  kH2,
  kH3,
  kZ,
  kKeepX,
  kKeepM,
  kKeepD,
  kLastX,
  kLastD,
  kLastH1,
  kLastH2,
  kLogSmall,
  kLogLarge,
  kInput,
  kColumns
};

enum Operand : int {
  kSample,
  kOutput,
  kUnconditional,
  kVariance,
  kHistory1,
  kHistory2,
  kHistory3,
  kLast,
  kNoise,
  kInputs,  // how many of them
  kNext = kInputs,
  kDenoised,
  kKept,
  kCorrected,
  kModelInput,
  kOperands
};

// Gradients of the outputs, in the order of the outputs, and of the inputs, in the order of those.
constexpr int kOutputs = kOperands - kInputs;

constexpr int64_t kStepRun = 2048;  // elements of one sample, a CPU's unit of work; a multiple of every vector

// Of log-probabilities and scores of samples in T.
template <class T>
using LogProb = std::conditional_t<sizeof(T) == 8, double, float>;

// Operands are dense within a sample, `stride` elements from one to the next; null where they are not asked for.
struct Elements {
  void* data;
  int64_t stride;
};

struct StepCall {
  Storage type;         // of samples, history, noise
  Storage output_type;  // of what the model makes and sees
  Elements operand[kOperands];
  bool guided, corrects;  // a backward has neither operand where it needs no values of it
  int64_t samples, sample_size;
  // The input of the model is written `copies` times: sample s of a group of `group` goes to place (c group + s),
  // groups follow each other.
  int64_t copies, group;

  const double* table;
  int64_t rows;
  const int64_t* step;  // null: `row`; else that of sample s is step[s % steps]
  int64_t steps, row;
  const double* guidance;  // likewise
  int64_t guidances;
  double guidance_scale;
  const double* adjust;  // null: none; else [adjusts, 2]: m is multiplied by the first, D / bound clipped to [-1, 1]
  int64_t adjusts;
  double low, high;  // of the clip; infinite where there is none

  const int64_t* key;  // null: noise is an operand, or a generator's
  int64_t keys;
  // Of a generator of PyTorch on CUDA: seed and offset, from `state` in the device's memory or by value. `threads`
  // draw, four numbers each at a time.
  bool draws;
  const int64_t* state;
  uint64_t seed, offset;
  int64_t threads;

  // Of a transition: the log-probability of its samples.
  void* log_prob;   // [samples]; null where it is not asked for
  Elements target;  // samples it is of; null: the new ones
  Elements score;   // its gradient with respect to the mean, of its type; in a backward an input

  PYPERF_HD bool has(int k) const { return operand[k].data != nullptr; }
  PYPERF_HD Storage log_prob_type() const { return type == Storage::f64 ? Storage::f64 : Storage::f32; }
  PYPERF_HD bool makes_noise() const { return draws || key; }
  PYPERF_HD bool clips() const { return adjust || low > -__builtin_huge_val() || high < __builtin_huge_val(); }
  PYPERF_HD int64_t runs() const { return (sample_size + kStepRun - 1) / kStepRun; }  // of a sample
  PYPERF_HD int64_t row_of(int64_t sample) const { return step ? step[sample % steps] : row; }
  PYPERF_HD double guidance_of(int64_t sample) const {
    return guidance ? guidance[sample % guidances] : guidance_scale;
  }
  PYPERF_HD int64_t model_input_at(int64_t sample, int64_t copy) const {
    return ((sample / group * copies + copy) * group + sample % group) * sample_size;
  }
};

// Gradients: of the outputs, null where an output was not asked for; of the inputs, null where they are not wanted.
struct StepGradients {
  Elements of_output[kOutputs];
  Elements of_input[kInputs];
  const void* of_log_prob;  // [samples], where the call has a score
};

// What a step needs to know of whole samples: StepCall::adjust of its operands kSample, kOutput, kUnconditional.
struct AdjustmentCall {
  StepCall step;
  double rescale, quantile, largest;  // a quantile of 0: no bound
  void* memory;                       // [samples, sample_size] of the arithmetic's type, where there is a quantile
  double* out;                        // [samples, 2]
};

}  // namespace pyperf::sampler
