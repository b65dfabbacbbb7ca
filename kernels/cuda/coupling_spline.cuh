// Rational-quadratic splines on CUDA: one thread for each element, its parameters in shared memory, gradients in their
// place. Nothing here allocates, synchronises or keeps state: the caller brings spline_workspace_bytes(...) bytes.
#pragma once

#include <algorithm>
#include <utility>

#include "../math/coupling.h"
#include "elementary.cuh"
#include "other_channels.cuh"
#include "parameter_rows.cuh"
#include "sample_sums.cuh"

namespace pyperf {
#include "../math/coupling_spline.h"
}

namespace pyperf::coupling {

// ---- plan ----

constexpr int kSplineThreads = 128;
constexpr int kRowParts = 3;  // widths, heights, derivatives; one where they are packed

// Units of work, one for each block: begin = unit / pieces * sample_size + unit % pieces * unit_elements if a sample
// has pieces, else unit * unit_elements. A unit is walked a tile at a time, a tile has at most one element a thread.
struct SplinePlan {
  int threads, tile;
  int64_t units, unit_elements, pieces;
  bool samples_in_tile;  // else a unit's log-dets belong to one sample
  bool linear;           // operand k of element i is at i * stride[k], no rows
  int parameter_bytes;
  int pitch;          // of the rows in shared memory, bytes
  int loads, stores;  // how many of the parts below
  cuda::RowPart load[kRowParts], store[kRowParts];
  int exponentials, tables, sums;  // where they are in shared memory, bytes; tables: 0 if there are none
  int parameters;
  size_t shared_bytes;
};

// Bins whose loops are unrolled, in float and with 32-bit or 16-bit parameters.
constexpr bool bins_are_unrolled(int bins) { return bins == 5 || bins == 8 || bins == 10 || bins == 16 || bins == 32; }

// operand's element i is at i * stride
inline bool is_linear(const SplineElements& e, int operand) {
  int64_t expected = e.n * e.stride[operand];
  for (int d = e.rows.dims - 1; d >= 0; --d) {
    if (e.rows.stride[operand][d] != expected && e.rows.size[d] != 1) return false;
    expected *= e.rows.size[d];
  }
  return true;
}

inline bool all_even(const SplineElements& e, int operand) {
  bool even = e.stride[operand] % 2 == 0 && reinterpret_cast<uintptr_t>(e.data[operand]) % 4 == 0;
  for (int d = 0; d < e.rows.dims; ++d) even = even && e.rows.stride[operand][d] % 2 == 0;
  return even;
}

// The parts of a row in the tensors from `operand` on.
inline int row_parts(const SplineElements& e, int operand, bool packed, int bins, int derivatives, int pitch,
                     cuda::RowPart (&parts)[kRowParts]) {
  const int bytes = storage_bytes(e.parameter_type);
  const int counts[kRowParts] = {packed ? 2 * bins + derivatives : bins, bins, derivatives};
  int at = 0, n = 0;
  for (; n < (packed ? 1 : kRowParts); ++n) {
    cuda::RowPart& part = parts[n];
    const int k = operand + n;
    part.count = counts[n];
    part.at = at;
    part.stride = e.parameter_stride[k] * bytes;
    part.unit = bytes;
    part.copy = part.count <= 1 || part.stride == bytes ? cuda::RowCopy::rows : cuda::RowCopy::lanes;
    if (part.count <= 1) part.stride = bytes;
    if (part.copy == cuda::RowCopy::rows && bytes == 2 && part.count % 2 == 0 && at % 4 == 0 && pitch % 4 == 0 &&
        all_even(e, k))
      part.unit = 4;
    if (part.copy == cuda::RowCopy::rows && part.count * bytes == pitch && e.stride[k] * bytes == pitch &&
        is_linear(e, k))
      part.copy = cuda::RowCopy::flat, part.unit = bytes;
    at += part.count * bytes;
  }
  return n;
}

// Rows that start in different banks: an odd number of words, or nearly.
inline int row_pitch(const SplineElements& e, int parameters) {
  const int bytes = storage_bytes(e.parameter_type), word = bytes < 4 ? 4 : bytes, row = parameters * bytes;
  return row % (4 * word) == 0 ? row + word : row;
}

template <bool kBackward, class R>
SplinePlan spline_plan(const SplineElements& e, const Spline<R>& c) {
  using cuda::RowCopy;
  constexpr int64_t kWalkedPieces = 4, kManySamples = 512, kSharedTiles = 4;
  constexpr size_t kSharedBytes = size_t(96) << 10;  // what every architecture since sm_80 has
  SplinePlan s{};
  const int parameters = s.parameters = 2 * c.bins + c.derivatives();
  s.parameter_bytes = storage_bytes(e.parameter_type);
  s.pitch = row_pitch(e, parameters);
  s.loads = row_parts(e, kWidths, e.packed, c.bins, c.derivatives(), s.pitch, s.load);
  const bool flat = s.load[0].copy == RowCopy::flat;
  s.linear = true;
  for (int k : {int(kInput), int(kResult)}) s.linear = s.linear && is_linear(e, k);
  for (int k = 0; k < s.loads; ++k)
    s.linear = s.linear && (s.load[k].copy == RowCopy::flat || is_linear(e, kWidths + k));
  const bool shares = kBackward && e.shared;
  if (kBackward) s.linear = s.linear && is_linear(e, kGradOutput);
  if (kBackward && !shares) {
    s.stores = row_parts(e, kGradWidths, e.grads_packed, c.bins, c.derivatives(), s.pitch, s.store);
    for (int k = 0; k < s.stores; ++k)
      s.linear = s.linear && (s.store[k].copy == RowCopy::flat || is_linear(e, kGradWidths + k));
  }
  if (!e.summed) s.linear = s.linear && is_linear(e, kLogdet);

  const bool unrolled = sizeof(R) == 4 && bins_are_unrolled(c.bins);
  const bool sums = !kBackward && e.summed;
  int tables = 0;
  for (int k = 0; k < s.loads; ++k)
    if (s.load[k].copy != RowCopy::flat) s.load[k].table = tables++;
  // What is stored flat must lie in shared memory as it does in global memory, modulo 16 bytes.
  const auto address = [&](int k) { return reinterpret_cast<uintptr_t>(e.data[k]); };
  for (int k = 0; k < s.stores; ++k) {
    cuda::RowPart& part = s.store[k];
    if (part.copy == RowCopy::flat && (!flat || (address(kWidths) - address(kGradWidths)) % 16 != 0))
      part.copy = RowCopy::rows;
    if (flat) part.unit = s.parameter_bytes;  // rows may begin at an odd half
    if (part.copy != RowCopy::flat) part.table = tables++;
  }
  const auto aligned = [](size_t bytes) { return (bytes + 15) / 16 * 16; };
  for (s.threads = kSplineThreads; s.threads >= 8; s.threads /= 2) {
    size_t bytes = aligned(16 + size_t(s.threads) * size_t(s.pitch));
    s.exponentials = int(bytes);
    if (!unrolled) bytes = aligned(bytes + size_t(s.threads) * size_t(2 * c.bins + 1) * sizeof(R));
    s.sums = int(bytes);
    if (sums) bytes += size_t(s.threads) * sizeof(double);
    if (shares) bytes += size_t(parameters) * sizeof(double);
    s.tables = tables ? int(bytes) : 0;
    bytes += size_t(tables) * size_t(s.threads) * sizeof(int64_t);
    s.shared_bytes = bytes;
    if (bytes <= kSharedBytes) break;
  }

  s.tile = s.threads;
  s.pieces = 1;
  s.unit_elements = s.tile;
  if (sums && e.sample_size <= s.tile) {
    s.samples_in_tile = true;
    s.tile = int(s.tile / e.sample_size * e.sample_size);
    s.unit_elements = s.tile;
  } else if (sums) {
    s.pieces = (e.sample_size + s.tile - 1) / s.tile;
    // One block walks through a sample where that does not leave the GPU idle, and saves the second launch.
    if (s.pieces <= kWalkedPieces || e.samples >= kManySamples) s.pieces = 1, s.unit_elements = e.sample_size;
  }
  if (shares) {
    s.unit_elements = std::min(e.sample_size, kSharedTiles * s.tile);
    s.pieces = (e.sample_size + s.unit_elements - 1) / s.unit_elements;
    s.units = e.samples * s.pieces;
    return s;
  }
  s.units = s.pieces > 1 ? e.samples * s.pieces : (e.count + s.unit_elements - 1) / s.unit_elements;
  return s;
}

// ---- a thread's parameters, in shared memory ----

template <class R>
PYPERF_DEVICE R load_as(const void* data, int64_t i, Storage type) {
  switch (type) {
    case Storage::f16: return loaded<R>(static_cast<const Float16*>(data)[i]);
    case Storage::bf16: return loaded<R>(static_cast<const BFloat16*>(data)[i]);
    case Storage::f32: return loaded<R>(static_cast<const float*>(data)[i]);
    default: return loaded<R>(static_cast<const double*>(data)[i]);
  }
}
template <class R>
PYPERF_DEVICE void store_as(void* data, int64_t i, Storage type, R value) {
  switch (type) {
    case Storage::f16: static_cast<Float16*>(data)[i] = stored<Float16>(value); break;
    case Storage::bf16: static_cast<BFloat16*>(data)[i] = stored<BFloat16>(value); break;
    case Storage::f32: static_cast<float*>(data)[i] = stored<float>(value); break;
    default: static_cast<double*>(data)[i] = stored<double>(value);
  }
}

struct FloatRow {
  float* data;

  PYPERF_DEVICE FloatRow(unsigned char* row, Storage) : data(reinterpret_cast<float*>(row)) {}
  PYPERF_DEVICE float get(int j) const { return data[j]; }
  PYPERF_DEVICE void put(int j, float value) const { data[j] = value; }
};

struct HalfRow {
  uint16_t* data;
  bool bf16;

  PYPERF_DEVICE HalfRow(unsigned char* row, Storage type)
      : data(reinterpret_cast<uint16_t*>(row)), bf16(type == Storage::bf16) {}
  PYPERF_DEVICE float get(int j) const {
    const uint16_t bits = data[j];
    return bf16 ? float(BFloat16{bits}) : float(Float16{bits});
  }
  PYPERF_DEVICE void put(int j, float value) const {
    data[j] = bf16 ? BFloat16::from(value).bits : Float16::from(value).bits;
  }
};

template <class R>
struct AnyRow {
  unsigned char* data;
  Storage type;

  PYPERF_DEVICE AnyRow(unsigned char* row, Storage type) : data(row), type(type) {}
  PYPERF_DEVICE R get(int j) const { return load_as<R>(data, j, type); }
  PYPERF_DEVICE void put(int j, R value) const { store_as<R>(data, j, type, value); }
};

template <class Row>
struct RowReader {
  Row row;
  int first;

  PYPERF_DEVICE auto operator()(int j) const { return row.get(first + j); }
};
template <class Row>
struct RowWriter {
  Row row;
  int first;

  template <class R>
  PYPERF_DEVICE void operator()(int j, R value) const {
    row.put(first + j, value);
  }
};

// ---- kernel ----

template <class R, int kBins>
struct Exponentials {
  R widths_[kBins], heights_[kBins];

  PYPERF_DEVICE Exponentials(const SplinePlan&, int) {}
  PYPERF_DEVICE R* widths() { return widths_; }
  PYPERF_DEVICE R* heights() { return heights_; }
};
template <class R>
struct Exponentials<R, 0> {
  R* row;
  int bins;

  // Rows of an odd length start in different banks.
  PYPERF_DEVICE Exponentials(const SplinePlan& s, int bins)
      : row(reinterpret_cast<R*>(cuda::dynamic_shared() + s.exponentials) + int(threadIdx.x) * (2 * bins + 1)),
        bins(bins) {}
  PYPERF_DEVICE R* widths() { return row; }
  PYPERF_DEVICE R* heights() { return row + bins; }
};

PYPERF_DEVICE void element_offsets(const SplineElements& e, bool linear, int64_t i,
                                   int64_t (&offsets)[kSplineOperands]) {
  if (linear) {
#pragma unroll
    for (int k = 0; k < kSplineOperands; ++k) offsets[k] = i * e.stride[k];
    return;
  }
  const cuda::Quotient at = cuda::divide(i, e.n);
  e.rows.offsets(at.quotient, offsets);
#pragma unroll
  for (int k = 0; k < kSplineOperands; ++k) offsets[k] += at.remainder * e.stride[k];
}

// Bounds, a mask and shared parameters have kernels of their own: the others would spill registers.
template <class R>
bool has_extras(const SplineElements& e, const Spline<R>& c) {
  return c.scaled || e.mask.data || e.shared;
}

// Blocks that a multiprocessor is to hold: as many as registers allow without spilling.
constexpr int spline_blocks(int bins, size_t real_bytes, bool extras) {
  if (extras) return spline_blocks(bins, real_bytes, false) - (bins <= 8 ? 2 : 1);
  if (bins == 0) return real_bytes == 8 ? 5 : 8;
  if (bins <= 8) return 7;
  if (bins <= 10) return 6;
  return bins <= 16 ? 5 : 3;
}

template <bool kBackward, int kBins, bool kExtras, class R, class Row>
__global__ void __launch_bounds__(kSplineThreads, spline_blocks(kBins, sizeof(R), kExtras))
    spline_kernel(SplineElements e, Spline<R> c, SplinePlan s, double* partials) {
  using M = ScalarMachine<R>;
  using cuda::RowCopy;
  unsigned char* const shared = cuda::dynamic_shared();
  const int thread = int(threadIdx.x), bins = kBins ? kBins : c.bins;
  const auto offsets_of = [&](const cuda::RowPart& part) {
    return reinterpret_cast<int64_t*>(shared + s.tables) + part.table * s.threads;
  };
  const auto part_data = [&](const cuda::RowPart& part, int operand, int64_t first) {
    const int64_t skipped = part.copy == RowCopy::flat ? first * s.pitch : 0;
    return static_cast<unsigned char*>(e.data[operand]) + skipped;
  };

  for (int64_t unit = blockIdx.x; unit < s.units; unit += gridDim.x) {
    int64_t begin = unit * s.unit_elements, end = begin + s.unit_elements;
    const bool shares = kExtras && kBackward && e.shared;
    if (s.pieces > 1 && (kExtras || !kBackward)) {
      const cuda::Quotient sample = cuda::divide(unit, s.pieces);
      begin = sample.quotient * e.sample_size + sample.remainder * s.unit_elements;
      end = begin + s.unit_elements;
      if (end > (sample.quotient + 1) * e.sample_size) end = (sample.quotient + 1) * e.sample_size;
    }
    if (end > e.count) end = e.count;
    double sum = 0;
    double* const sums = reinterpret_cast<double*>(shared + s.sums);
    if (shares)
      for (int j = thread; j < s.parameters; j += s.threads) sums[j] = 0;  // read by the same thread
    for (int64_t first = begin; first < end; first += s.tile) {
      const int rows = int(end - first < s.tile ? end - first : s.tile);
      const bool active = thread < rows;
      const int64_t i = active ? first + thread : first;
      int64_t offsets[kSplineOperands];
      element_offsets(e, s.linear, i, offsets);
      if (s.tables) {
#pragma unroll
        for (int k = 0; k < kRowParts; ++k) {
          if (k < s.loads && s.load[k].copy != RowCopy::flat)
            offsets_of(s.load[k])[thread] = offsets[kWidths + k] * s.parameter_bytes;
          if (kBackward && k < s.stores && s.store[k].copy != RowCopy::flat)
            offsets_of(s.store[k])[thread] = offsets[kGradWidths + k] * s.parameter_bytes;
        }
        __syncthreads();
      }
      const bool flat = s.load[0].copy == RowCopy::flat;
      unsigned char* const rows_at =
          shared + (flat ? reinterpret_cast<uintptr_t>(part_data(s.load[0], kWidths, first)) % 16 : 0);
      for (int k = 0; k < s.loads; ++k)
        cuda::move_part<false>(s.load[k], rows_at, s.pitch, part_data(s.load[k], kWidths + k, first),
                               offsets_of(s.load[k]), rows);
      const R x = load_as<R>(e.data[kInput], offsets[kInput], e.type);
      const R bound = kExtras && c.scaled ? load_as<R>(e.bounds.data, e.bounds.offset(i), e.logdet_type) : R(0);
      R grad_y = 0, grad_logdet = 0;
      if constexpr (kBackward) {
        grad_y = load_as<R>(e.data[kGradOutput], offsets[kGradOutput], e.type);
        grad_logdet = e.summed ? load_as<R>(e.sample_logdet, cuda::divide(i, e.sample_size).quotient, e.logdet_type)
                               : load_as<R>(e.data[kLogdet], offsets[kLogdet], e.logdet_type);
      }
      cuda::wait_for_copies();
      __syncthreads();
      if (active) {
        const Row row(rows_at + thread * s.pitch, e.parameter_type);
        const RowReader<Row> widths{row, 0}, heights{row, bins}, derivatives{row, 2 * bins};
        Exponentials<R, kBins> exponentials(s, bins);
        math::SplinePoint<M> point;
        math::spline_locate<M, kBins, kExtras>(c, x, bound, widths, heights, derivatives, exponentials.widths(),
                                               exponentials.heights(), point);
        if constexpr (kBackward) {
          asm volatile("" ::: "memory");  // else registers keep parameters, which only one parametrization reads again
          const R grad_x = math::spline_gradients<M, kBins, kExtras>(
              c, point, grad_y, grad_logdet, widths, heights, exponentials.widths(), exponentials.heights(),
              RowWriter<Row>{row, 0}, RowWriter<Row>{row, bins}, RowWriter<Row>{row, 2 * bins});
          const bool passes = kExtras && e.mask.data && !static_cast<const bool*>(e.mask.data)[e.mask.offset(i)];
          for (int j = 0; passes && j < s.parameters; ++j) row.put(j, R(0));
          store_as<R>(e.data[kResult], offsets[kResult], e.type, passes ? grad_y : grad_x);
        } else {
          R y, logdet;
          math::spline_value<M, kExtras>(c, point, x, y, logdet);
          if (kExtras && e.mask.data && !static_cast<const bool*>(e.mask.data)[e.mask.offset(i)]) y = x, logdet = R(0);
          store_as<R>(e.data[kResult], offsets[kResult], e.type, y);
          if (e.summed)
            sum += double(logdet);
          else
            store_as<R>(e.data[kLogdet], offsets[kLogdet], e.logdet_type, logdet);
        }
      }
      __syncthreads();
      if constexpr (kBackward) {
        for (int j = thread; shares && j < s.parameters; j += s.threads) {
          double all = sums[j];
          for (int r = 0; r < rows; ++r) all += double(Row(rows_at + r * s.pitch, e.parameter_type).get(j));
          sums[j] = all;
        }
        for (int k = 0; k < s.stores; ++k)
          cuda::move_part<true>(s.store[k], rows_at, s.pitch, part_data(s.store[k], kGradWidths + k, first),
                                offsets_of(s.store[k]), rows);
        __syncthreads();
      }
    }
    if (shares) {
      double* const to = s.pieces > 1 ? partials : e.shared;
      for (int j = thread; j < s.parameters; j += s.threads) to[unit * s.parameters + j] = sums[j];
    }
    if (kBackward || !e.summed) continue;
    sums[thread] = sum;
    if (s.samples_in_tile) {
      const int rows = int(end - begin), size = int(e.sample_size), place = thread % size;
      cuda::sum_group(sums + (thread - place), place, size, thread < rows);
      if (thread < rows && place == 0)
        store_as<double>(e.sample_logdet, cuda::divide(begin + thread, size).quotient, e.logdet_type, sums[thread]);
    } else {
      cuda::sum_group(sums, thread, s.threads, true);
      if (thread == 0 && s.pieces > 1) partials[unit] = sums[0];
      if (thread == 0 && s.pieces == 1) store_as<double>(e.sample_logdet, unit, e.logdet_type, sums[0]);
    }
    __syncthreads();
  }
  cuda::copy_others(e.others);
}

// ---- launch ----

template <bool kBackward, int kBins, class R, class Row>
cudaError_t launch_spline(const SplineElements& e, const Spline<R>& c, const SplinePlan& s, double* partials,
                          cudaStream_t stream) {
  const auto kernel =
      has_extras(e, c) ? spline_kernel<kBackward, kBins, true, R, Row> : spline_kernel<kBackward, kBins, false, R, Row>;
  const int64_t blocks = std::max(s.units, cuda::blocks_for_others(e.others, s.threads));
  return cuda::launch(kernel, blocks, s.threads, s.shared_bytes, stream, e, c, s, partials);
}

template <bool kBackward, class Row>
cudaError_t launch_unrolled_spline(const SplineElements& e, const Spline<float>& c, const SplinePlan& s,
                                   double* partials, cudaStream_t stream) {
  switch (c.bins) {
    case 5: return launch_spline<kBackward, 5, float, Row>(e, c, s, partials, stream);
    case 8: return launch_spline<kBackward, 8, float, Row>(e, c, s, partials, stream);
    case 10: return launch_spline<kBackward, 10, float, Row>(e, c, s, partials, stream);
    case 16: return launch_spline<kBackward, 16, float, Row>(e, c, s, partials, stream);
    default: return launch_spline<kBackward, 32, float, Row>(e, c, s, partials, stream);
  }
}

template <bool kBackward, class R>
int64_t spline_workspace_bytes(const SplineElements& e, const Spline<R>& c) {
  if ((kBackward ? !e.shared : !e.summed) || e.count == 0) return 0;
  const SplinePlan s = spline_plan<kBackward>(e, c);
  return s.pieces > 1 ? s.units * int64_t(sizeof(double)) * (kBackward ? s.parameters : 1) : 0;
}

inline cudaError_t sum_pieces(const SplineElements& e, int64_t pieces, const double* partials, cudaStream_t stream) {
  return e.logdet_type == Storage::f64
             ? cuda::sum_partials<double>(partials, e.samples, pieces, 1, e.sample_logdet, stream)
             : cuda::sum_partials<float>(partials, e.samples, pieces, 1, e.sample_logdet, stream);
}

template <bool kBackward, class R>
cudaError_t spline(const SplineElements& e, const Spline<R>& c, void* workspace, cudaStream_t stream) {
  double* const partials = static_cast<double*>(workspace);
  if (e.count == 0) {
    if constexpr (!kBackward)
      if (e.summed) return sum_pieces(e, 0, partials, stream);
    return cudaSuccess;
  }
  const SplinePlan s = spline_plan<kBackward>(e, c);
  cudaError_t error;
  if constexpr (sizeof(R) == 4) {
    if (!bins_are_unrolled(c.bins))
      error = launch_spline<kBackward, 0, R, AnyRow<R>>(e, c, s, partials, stream);
    else if (s.parameter_bytes == 4)
      error = launch_unrolled_spline<kBackward, FloatRow>(e, c, s, partials, stream);
    else
      error = launch_unrolled_spline<kBackward, HalfRow>(e, c, s, partials, stream);
  } else {
    error = launch_spline<kBackward, 0, R, AnyRow<R>>(e, c, s, partials, stream);
  }
  if (error != cudaSuccess || s.pieces == 1) return error;
  if constexpr (kBackward)
    return cuda::sum_partials<double>(partials, e.samples, s.pieces, s.parameters, e.shared, stream);
  else
    return sum_pieces(e, s.pieces, partials, stream);
}

}  // namespace pyperf::coupling
