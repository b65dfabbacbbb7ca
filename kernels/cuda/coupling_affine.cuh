// Affine couplings on a GPU: one kernel a direction, a thread for each element, or for 16 bytes of neighbours where all
// operands lie so. Log-dets of a sample are summed by one block in a fixed order, or, where a sample is cut, by one
// block a piece and a second kernel that adds the pieces up.
#pragma once

#include <algorithm>

#include "../common/sample_units.h"
#include "../math/coupling_affine_call.h"
#include "common.cuh"
#include "elementary.cuh"
#include "other_channels.cuh"

namespace pyperf {
#include "../math/coupling_affine.h"
}  // namespace pyperf

namespace pyperf::coupling {

constexpr int kAffineBlock = 256;
constexpr int64_t kAffineSample = 4096;  // elements of one sample that a block takes on

// ---- operands ----

// kWidth neighbours of an operand.
template <class S, int kWidth>
struct alignas(sizeof(S) * kWidth) PackedStorage {
  S v[kWidth];
};

template <class R, int kWidth, class S>
PYPERF_DEVICE void load_packed(const void* data, int64_t at, R (&to)[kWidth]) {
  PackedStorage<S, kWidth> s;
  s = *reinterpret_cast<const PackedStorage<S, kWidth>*>(static_cast<const S*>(data) + at);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) to[i] = loaded<R>(s.v[i]);
}
template <class R, int kWidth, class S>
PYPERF_DEVICE void store_packed(void* data, int64_t at, const R (&from)[kWidth]) {
  PackedStorage<S, kWidth> s;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) s.v[i] = stored<S>(from[i]);
  *reinterpret_cast<PackedStorage<S, kWidth>*>(static_cast<S*>(data) + at) = s;
}

template <class R, int kWidth>
PYPERF_DEVICE void load_operand(const void* data, Storage type, int64_t at, R (&to)[kWidth]) {
  if constexpr (sizeof(R) == 8) {
    load_packed<R, kWidth, double>(data, at, to);
  } else {
    if (type == Storage::f32) return load_packed<R, kWidth, float>(data, at, to);
    if (type == Storage::f16) return load_packed<R, kWidth, Float16>(data, at, to);
    load_packed<R, kWidth, BFloat16>(data, at, to);
  }
}
template <class R, int kWidth>
PYPERF_DEVICE void store_operand(void* data, Storage type, int64_t at, const R (&from)[kWidth]) {
  if constexpr (sizeof(R) == 8) {
    store_packed<R, kWidth, double>(data, at, from);
  } else {
    if (type == Storage::f32) return store_packed<R, kWidth, float>(data, at, from);
    if (type == Storage::f16) return store_packed<R, kWidth, Float16>(data, at, from);
    store_packed<R, kWidth, BFloat16>(data, at, from);
  }
}

// Element offsets of the operands at element e.
template <int N>
PYPERF_DEVICE void locate(const AffineCall<N>& call, int64_t e, int64_t (&at)[N]) {
  if (call.rows.count == 1) {
    for (int k = 0; k < N; ++k) at[k] = e * call.stride[k];
    return;
  }
  const cuda::Quotient row = cuda::divide(e, call.n);
  for (int k = 0; k < N; ++k) at[k] = row.remainder * call.stride[k];
  int64_t r = row.quotient;
  for (int d = call.rows.dims - 1; d >= 0 && r; --d) {
    const cuda::Quotient next = d ? cuda::divide(r, call.rows.size[d]) : cuda::Quotient{0, r};
    for (int k = 0; k < N; ++k) at[k] += next.remainder * call.rows.stride[k][d];
    r = next.quotient;
  }
}

// Whether groups of `width` neighbours lie next to each other, aligned, in one row and in one sample.
template <int N>
bool packs(const AffineCall<N>& call, int width, int skipped) {
  if (call.n % width || (call.summed && call.sample_size % width)) return false;
  for (int k = 0; k < N; ++k) {
    if (call.summed && k == skipped) continue;
    const int64_t bytes = int64_t(width) * storage_bytes(call.type[k]);
    if (call.stride[k] != 1 || reinterpret_cast<uintptr_t>(call.data[k]) % uintptr_t(bytes)) return false;
    for (int d = 0; d < call.rows.dims; ++d)
      if (call.rows.stride[k][d] % width) return false;
  }
  return true;
}

// ---- arithmetic ----

template <class R>
PYPERF_DEVICE void scale_of(const Affine& how, const math::AffineConstants<R>& c, R u, R& logdet, R& factor,
                            R& exponent, R& slope) {
  using M = ScalarMachine<R>;
  switch (how.activation) {
    case Activation::none: return math::scale_of<M, Activation::none>(c, u, logdet, factor, exponent, slope);
    case Activation::exp: return math::scale_of<M, Activation::exp>(c, u, logdet, factor, exponent, slope);
    case Activation::sigmoid: return math::scale_of<M, Activation::sigmoid>(c, u, logdet, factor, exponent, slope);
    case Activation::softplus: return math::scale_of<M, Activation::softplus>(c, u, logdet, factor, exponent, slope);
    case Activation::tanh: return math::scale_of<M, Activation::tanh>(c, u, logdet, factor, exponent, slope);
    case Activation::atan: return math::scale_of<M, Activation::atan>(c, u, logdet, factor, exponent, slope);
    case Activation::softclip: return math::scale_of<M, Activation::softclip>(c, u, logdet, factor, exponent, slope);
    case Activation::sigmoid_floor:
      return math::scale_of<M, Activation::sigmoid_floor>(c, u, logdet, factor, exponent, slope);
    case Activation::softplus_floor:
      return math::scale_of<M, Activation::softplus_floor>(c, u, logdet, factor, exponent, slope);
  }
}

// kWidth elements from e on; returns the sum of their log-dets.
template <class R, int kWidth>
PYPERF_DEVICE double forward_at(const AffineCall<kForwardOperands>& call, const math::AffineConstants<R>& c,
                                int64_t e) {
  using M = ScalarMachine<R>;
  int64_t at[kForwardOperands];
  locate(call, e, at);
  R x[kWidth], u[kWidth], shift[kWidth], y[kWidth], logdet[kWidth];
  load_operand(call.data[kX], call.type[kX], at[kX], x);
  load_operand(call.data[kShift], call.type[kShift], at[kShift], shift);
  if (call.how.activation != Activation::none)
    load_operand(call.data[kScale], call.type[kScale], at[kScale], u);
  else
    for (int i = 0; i < kWidth; ++i) u[i] = 0;
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    R factor, exponent, slope;
    scale_of(call.how, c, u[i], logdet[i], factor, exponent, slope);
    y[i] = call.how.shift_before ? math::affine_value<M, true>(c, x[i], shift[i], factor, exponent)
                                 : math::affine_value<M, false>(c, x[i], shift[i], factor, exponent);
    sum += double(logdet[i]);
  }
  store_operand(call.data[kY], call.type[kY], at[kY], y);
  if (!call.summed) store_operand(call.data[kLogdet], call.type[kLogdet], at[kLogdet], logdet);
  return sum;
}

template <class R, int kWidth>
PYPERF_DEVICE void backward_at(const AffineCall<kBackwardOperands>& call, const math::AffineConstants<R>& c,
                               int64_t e) {
  using M = ScalarMachine<R>;
  int64_t at[kBackwardOperands];
  locate(call, e, at);
  R grad_y[kWidth], grad_logdet[kWidth], x[kWidth], u[kWidth], shift[kWidth];
  load_operand(call.data[kGradY], call.type[kGradY], at[kGradY], grad_y);
  load_operand(call.data[kOfX], call.type[kOfX], at[kOfX], x);
  load_operand(call.data[kOfScale], call.type[kOfScale], at[kOfScale], u);
  for (int i = 0; i < kWidth; ++i) shift[i] = 0;
  if (call.how.shift_before) load_operand(call.data[kOfShift], call.type[kOfShift], at[kOfShift], shift);
  if (call.summed) {
    const R grad = static_cast<const R*>(call.data[kGradLogdet])[cuda::divide(e, call.sample_size).quotient];
    for (int i = 0; i < kWidth; ++i) grad_logdet[i] = grad;
  } else {
    load_operand(call.data[kGradLogdet], call.type[kGradLogdet], at[kGradLogdet], grad_logdet);
  }
  R grad_x[kWidth], grad_scale[kWidth], grad_shift[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    R logdet, factor, exponent, slope;
    scale_of(call.how, c, u[i], logdet, factor, exponent, slope);
    if (call.how.shift_before)
      math::affine_gradients<M, true>(c, grad_y[i], grad_logdet[i], x[i], shift[i], factor, exponent, slope, grad_x[i],
                                      grad_scale[i], grad_shift[i]);
    else
      math::affine_gradients<M, false>(c, grad_y[i], grad_logdet[i], x[i], shift[i], factor, exponent, slope, grad_x[i],
                                       grad_scale[i], grad_shift[i]);
  }
  store_operand(call.data[kGradX], call.type[kGradX], at[kGradX], grad_x);
  store_operand(call.data[kGradScale], call.type[kGradScale], at[kGradScale], grad_scale);
  store_operand(call.data[kGradShift], call.type[kGradShift], at[kGradShift], grad_shift);
}

// ---- kernels ----

// Sums, where there are any, are 0: of additive couplings, and of samples without elements.
template <class R, int kWidth>
__global__ void __launch_bounds__(kAffineBlock)
    affine_forward_kernel(AffineCall<kForwardOperands> call, int64_t groups) {
  const math::AffineConstants<R> c(call.how);
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t g = thread; g < groups; g += threads) forward_at<R, kWidth>(call, c, g * kWidth);
  for (int64_t s = thread; call.summed && s < call.samples; s += threads) static_cast<R*>(call.data[kLogdet])[s] = 0;
  cuda::copy_others(call.others);
}

template <class R, int kWidth>
__global__ void __launch_bounds__(kAffineBlock)
    affine_backward_kernel(AffineCall<kBackwardOperands> call, int64_t groups) {
  const math::AffineConstants<R> c(call.how);
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t g = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; g < groups; g += threads)
    backward_at<R, kWidth>(call, c, g * kWidth);
  cuda::copy_others(call.others);
}

// `lanes` threads, a power of two, share each piece of a sample: every thread adds up what it meets, then they halve.
// pieces > 1: sums of pieces go to `partials`.
template <class R, int kWidth>
__global__ void __launch_bounds__(kAffineBlock, 2)
    affine_sums_kernel(AffineCall<kForwardOperands> call, int64_t pieces, int lanes, double* partials) {
  __shared__ double shared[kAffineBlock];
  const math::AffineConstants<R> c(call.how);
  const int lane = int(threadIdx.x) & (lanes - 1);
  const int64_t per_block = blockDim.x / lanes, total = call.samples * pieces;
  const int64_t length = pieces > 1 ? kAffineSample : call.sample_size;
  const int64_t blocks = (total + per_block - 1) / per_block;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {  // all threads of a block stay together
    const int64_t item = block * per_block + int64_t(threadIdx.x) / lanes;
    double sum = 0;
    if (item < total) {
      const cuda::Quotient sample = cuda::divide(item, pieces);
      const int64_t begin = sample.quotient * call.sample_size, first = sample.remainder * length;
      const int64_t end = first + length < call.sample_size ? first + length : call.sample_size;
      for (int64_t i = first + int64_t(lane) * kWidth; i < end; i += int64_t(lanes) * kWidth)
        sum += forward_at<R, kWidth>(call, c, begin + i);
    }
    shared[threadIdx.x] = sum;
    __syncthreads();
    for (int half = lanes / 2; half > 0; half /= 2) {
      if (lane < half) shared[threadIdx.x] += shared[threadIdx.x + half];
      __syncthreads();
    }
    if (lane == 0 && item < total) {
      if (pieces > 1)
        partials[item] = shared[threadIdx.x];
      else
        static_cast<R*>(call.data[kLogdet])[item] = R(shared[threadIdx.x]);
    }
    __syncthreads();
  }
  cuda::copy_others(call.others);
}

// The sum of a sample's pieces, in order; one warp-sized group of threads a sample.
template <class R>
__global__ void __launch_bounds__(kAffineBlock)
    affine_pieces_kernel(const double* partials, int64_t samples, int64_t pieces, R* sums) {
  __shared__ double shared[kAffineBlock];
  constexpr int kLanes = 32;
  const int lane = int(threadIdx.x) % kLanes;
  const int64_t per_block = blockDim.x / kLanes, blocks = (samples + per_block - 1) / per_block;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t sample = block * per_block + int64_t(threadIdx.x) / kLanes;
    double sum = 0;
    for (int64_t p = lane; sample < samples && p < pieces; p += kLanes) sum += partials[sample * pieces + p];
    shared[threadIdx.x] = sum;
    __syncthreads();
    for (int half = kLanes / 2; half > 0; half /= 2) {
      if (lane < half) shared[threadIdx.x] += shared[threadIdx.x + half];
      __syncthreads();
    }
    if (lane == 0 && sample < samples) sums[sample] = R(shared[threadIdx.x]);
    __syncthreads();
  }
}

// ---- launchers ----

// Pieces of a sample: one where a block takes it whole, and where there are samples enough to fill the machine.
inline int64_t affine_pieces(const AffineCall<kForwardOperands>& call) {
  constexpr int64_t kMany = 4096;
  if (!call.summed || call.sample_size <= kAffineSample || call.samples >= kMany) return 1;
  return (call.sample_size + kAffineSample - 1) / kAffineSample;
}

inline int64_t affine_workspace_bytes(const AffineCall<kForwardOperands>& call) {
  const int64_t pieces = affine_pieces(call);
  return pieces > 1 ? call.samples * pieces * int64_t(sizeof(double)) : 0;
}

// Blocks for so much work, and for what else a kernel does.
template <int N>
int64_t affine_blocks(const AffineCall<N>& call, int64_t work, int64_t each) {
  return std::max((work + each - 1) / each, cuda::blocks_for_others(call.others, kAffineBlock));
}

template <class R, int kWidth>
cudaError_t affine_forward_packed(const AffineCall<kForwardOperands>& call, void* memory, cudaStream_t stream) {
  const int64_t groups = call.elements() / kWidth;
  if (!call.summed || call.how.activation == Activation::none || groups == 0) {
    const int64_t work = std::max(groups, call.summed ? call.samples : 0);
    return cuda::launch(affine_forward_kernel<R, kWidth>, affine_blocks(call, work, kAffineBlock), kAffineBlock, 0,
                        stream, call, groups);
  }
  const int64_t pieces = affine_pieces(call), length = pieces > 1 ? kAffineSample : call.sample_size;
  int lanes = 1;
  while (lanes < kAffineBlock && int64_t(lanes) * kWidth < length) lanes *= 2;
  const int64_t per_block = kAffineBlock / lanes, total = call.samples * pieces;
  double* const partials = static_cast<double*>(memory);
  const cudaError_t error = cuda::launch(affine_sums_kernel<R, kWidth>, affine_blocks(call, total, per_block),
                                         kAffineBlock, 0, stream, call, pieces, lanes, partials);
  if (error != cudaSuccess || pieces == 1) return error;
  constexpr int64_t kPerBlock = kAffineBlock / 32;
  return cuda::launch(affine_pieces_kernel<R>, (call.samples + kPerBlock - 1) / kPerBlock, kAffineBlock, 0, stream,
                      partials, call.samples, pieces, static_cast<R*>(call.data[kLogdet]));
}

template <class R>
cudaError_t affine_forward(const AffineCall<kForwardOperands>& call, void* memory, cudaStream_t stream) {
  constexpr int kWidth = 16 / int(sizeof(R));
  if (packs(call, kWidth, int(kLogdet))) return affine_forward_packed<R, kWidth>(call, memory, stream);
  return affine_forward_packed<R, 1>(call, memory, stream);
}

template <class R>
cudaError_t affine_backward(const AffineCall<kBackwardOperands>& call, cudaStream_t stream) {
  constexpr int kWidth = 16 / int(sizeof(R));
  const bool packed = packs(call, kWidth, int(kGradLogdet));
  const int64_t groups = call.elements() / (packed ? kWidth : 1);
  return cuda::launch(packed ? affine_backward_kernel<R, kWidth> : affine_backward_kernel<R, 1>,
                      affine_blocks(call, groups, kAffineBlock), kAffineBlock, 0, stream, call, groups);
}

}  // namespace pyperf::coupling
