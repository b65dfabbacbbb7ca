// What a step needs to know of whole samples, a block for each: the ratio of two standard deviations, and a quantile of
// the sizes of the denoised sample by a radix search over their bits. Integer counts and sums in one order.
#pragma once

#include "sampler.cuh"

namespace pyperf::sampler {

constexpr int kAdjustThreads = 512, kDigitBits = 8, kDigits = 1 << kDigitBits;

template <class R>
using BitsOf = std::conditional_t<sizeof(R) == 4, uint32_t, uint64_t>;

template <class R>
struct AdjustShared {
  StepWeights<R> weights;
  double sums[4][kAdjustThreads];
  unsigned long long counts[kDigits];
  BitsOf<R> found;
  unsigned long long rank;
  double least[kAdjustThreads];
};

// v[0] of all threads together, in one order. All threads of the block call this.
template <class V, class Join>
PYPERF_DEVICE V joined(V* v, V own, const Join& join) {
  v[threadIdx.x] = own;
  for (int half = kAdjustThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) v[threadIdx.x] = join(v[threadIdx.x], v[threadIdx.x + half]);
  }
  __syncthreads();
  const V all = v[0];
  __syncthreads();
  return all;
}

// visit(element) for the elements of a thread.
template <class Visit>
PYPERF_DEVICE void each_element(int64_t n, const Visit& visit) {
  for (int64_t i = threadIdx.x; i < n; i += kAdjustThreads) visit(i);
}

// The bits of the value of rank `rank` among n that are at least 0: digit by digit from the top, those that agree in
// the digits before are counted.
template <class R>
PYPERF_DEVICE BitsOf<R> bits_of_rank(const R* values, int64_t n, int64_t rank, AdjustShared<R>& shared) {
  using Bits = BitsOf<R>;
  if (threadIdx.x == 0) shared.found = 0, shared.rank = uint64_t(rank);
  for (int shift = int(sizeof(R)) * 8 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int i = threadIdx.x; i < kDigits; i += kAdjustThreads) shared.counts[i] = 0;
    __syncthreads();
    const Bits found = shared.found;
    each_element(n, [&](int64_t i) {
      Bits bits;
      memcpy(&bits, &values[i], sizeof bits);
      const bool agrees = shift + kDigitBits >= int(sizeof(R)) * 8 || (bits ^ found) >> (shift + kDigitBits) == 0;
      if (agrees) atomicAdd(&shared.counts[int(bits >> shift) & (kDigits - 1)], 1ull);
    });
    __syncthreads();
    if (threadIdx.x == 0) {
      int digit = 0;
      unsigned long long left = shared.rank;
      while (left >= shared.counts[digit]) left -= shared.counts[digit++];
      shared.rank = left, shared.found |= Bits(digit) << shift;
    }
    __syncthreads();
  }
  return shared.found;
}

template <class R>
PYPERF_DEVICE double quantile_of(const R* values, int64_t n, double quantile, AdjustShared<R>& shared) {
  const double place = quantile * double(n - 1);
  const int64_t below = int64_t(place);
  const BitsOf<R> bits = bits_of_rank(values, n, below, shared);
  R low;
  memcpy(&low, &bits, sizeof low);
  // The next one is the same where more than `below` + 1 are not above, else the least above.
  long long not_above = 0;
  double least = double(INFINITY);
  each_element(n, [&](int64_t i) {
    const R v = values[i];
    if (v <= low)
      ++not_above;
    else
      least = double(v) < least ? double(v) : least;
  });
  const double sum = joined(shared.sums[0], double(not_above), [](double a, double b) { return a + b; });
  const double above = joined(shared.least, least, [](double a, double b) { return a < b ? a : b; });
  const double high = sum > double(below + 1) || below + 1 >= n ? double(low) : above;
  return double(low) + (high - double(low)) * (place - double(below));
}

template <class T, class O>
__global__ void __launch_bounds__(kAdjustThreads, 1) adjustments_kernel(AdjustmentCall call) {
  using R = Arithmetic<T>;
  using M = ScalarMachine<R>;
  __shared__ AdjustShared<R> shared;
  const StepCall& step = call.step;
  const int64_t n = step.sample_size;
  const auto add = [](double a, double b) { return a + b; };
  for (int64_t sample = blockIdx.x; sample < step.samples; sample += gridDim.x) {
    __syncthreads();
    if (threadIdx.x == 0) shared.weights = StepWeights<R>(step, sample);
    __syncthreads();
    const StepWeights<R>& w = shared.weights;
    const auto at = [&](int k) {
      return static_cast<const O*>(step.operand[k].data) + sample * step.operand[k].stride;
    };
    const O* const output = at(kOutput);
    const O* const unconditional = step.has(kUnconditional) ? at(kUnconditional) : nullptr;
    const auto guided = [&](int64_t i) {
      const R m = loaded<R>(output[i]);
      return unconditional ? math::guided<M>(w, m, loaded<R>(unconditional[i])) : m;
    };
    double factor = 1, bound = double(INFINITY);
    if (call.rescale != 0 && unconditional) {
      const double about[2] = {loaded<double>(output[0]), double(guided(0))};
      double sums[4] = {};
      each_element(n, [&](int64_t i) {
        const double d[2] = {loaded<double>(output[i]) - about[0], double(guided(i)) - about[1]};
        for (int k = 0; k < 2; ++k) sums[2 * k] += d[k], sums[2 * k + 1] += d[k] * d[k];
      });
      for (int k = 0; k < 4; ++k) sums[k] = joined(shared.sums[k], sums[k], add);
      const double variances[2] = {sums[1] - sums[0] * sums[0] / double(n), sums[3] - sums[2] * sums[2] / double(n)};
      const double ratio = ::sqrt(variances[0] / variances[1]);
      factor = n > 1 ? call.rescale * ratio + (1 - call.rescale) : double(NAN);
    }
    if (call.quantile != 0) {
      R* const sizes = static_cast<R*>(call.memory) + sample * n;
      const T* const x = static_cast<const T*>(step.operand[kSample].data) + sample * step.operand[kSample].stride;
      double unordered = 0;
      each_element(n, [&](int64_t i) {
        const R d = math::unclipped<M>(w, loaded<R>(x[i]), guided(i) * R(factor));
        sizes[i] = d < R(0) ? -d : d == R(0) ? R(0) : d;
        unordered += d != d;
      });
      unordered = joined(shared.sums[0], unordered, add);  // also makes all sizes known to all threads
      bound = unordered > 0 ? double(NAN) : quantile_of(sizes, n, call.quantile, shared);
      if (!(unordered > 0)) bound = bound < 1 ? 1 : bound > call.largest ? call.largest : bound;
    }
    if (threadIdx.x == 0) call.out[2 * sample] = factor, call.out[2 * sample + 1] = bound;
  }
}

inline cudaError_t adjustments(const AdjustmentCall& call, cudaStream_t stream) {
  return with_types(call.step, [&](auto t, auto o) {
    return cuda::launch(&adjustments_kernel<decltype(t), decltype(o)>, call.step.samples, kAdjustThreads, 0, stream,
                        call);
  });
}

}  // namespace pyperf::sampler
