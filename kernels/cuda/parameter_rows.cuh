// Rows of parameters between global and shared memory. A block copies the rows of all its elements, so that an access
// to global memory is as wide and as dense as the tensor allows; a thread then works on its own row.
#pragma once

#include "common.cuh"

namespace pyperf::cuda {

enum class RowCopy : int {
  flat,   // rows follow each other as they do in shared memory: 16 bytes at a time
  rows,   // dense rows anywhere: neighbouring threads copy neighbouring parameters
  lanes,  // anything: a thread copies its own row, dense where parameters are planes of neighbouring elements
};

// What one tensor holds of every row.
struct RowPart {
  RowCopy copy;
  int count;       // parameters
  int at;          // the first one's place in the row in shared memory, bytes
  int unit;        // bytes of an access, rows and lanes
  int table;       // which offsets, rows and lanes
  int64_t stride;  // between parameters, bytes
};

// kBytes from global to shared memory, there after wait_for_copies() and a barrier. Aligned to kBytes.
template <int kBytes>
PYPERF_DEVICE void copy_async(unsigned char* shared, const unsigned char* global) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16)  // past the L1 cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes) : "memory");
#else
  memcpy(__builtin_assume_aligned(shared, kBytes), __builtin_assume_aligned(global, kBytes), kBytes);
#endif
}
PYPERF_DEVICE void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

template <bool kStore, class Unit>
PYPERF_DEVICE void move_unit(unsigned char* shared, unsigned char* global) {
  if constexpr (kStore)
    *reinterpret_cast<Unit*>(global) = *reinterpret_cast<const Unit*>(shared);
  else if constexpr (sizeof(Unit) >= 4)
    copy_async<int(sizeof(Unit))>(shared, global);
  else
    *reinterpret_cast<Unit*>(shared) = *reinterpret_cast<const Unit*>(global);
}

// One range of bytes; both addresses are the same modulo 16.
template <bool kStore, class Element>
PYPERF_DEVICE void move_range(unsigned char* shared, unsigned char* global, int bytes) {
  int head = int(-reinterpret_cast<uintptr_t>(global) & 15);
  head = head < bytes ? head : bytes;
  const int vectors = (bytes - head) / 16, tail = head + vectors * 16;
#pragma unroll 4
  for (int v = int(threadIdx.x); v < vectors; v += int(blockDim.x))
    move_unit<kStore, uint4>(shared + head + v * 16, global + head + v * 16);
  const int edges = (head + bytes - tail) / int(sizeof(Element));
  for (int k = int(threadIdx.x); k < edges; k += int(blockDim.x)) {
    int at = k * int(sizeof(Element));
    at = at < head ? at : at - head + tail;
    move_unit<kStore, Element>(shared + at, global + at);
  }
}

template <bool kStore, class Unit>
PYPERF_DEVICE void move_rows(unsigned char* shared, int pitch, unsigned char* global, const int64_t* offsets, int rows,
                             int units) {
  const int threads = int(blockDim.x), thread = int(threadIdx.x);
  const int more_rows = threads / units, more_units = threads - more_rows * units;
  int row = thread / units, unit = thread - row * units;
#pragma unroll 4
  while (row < rows) {
    move_unit<kStore, Unit>(shared + row * pitch + unit * int(sizeof(Unit)),
                            global + offsets[row] + unit * int(sizeof(Unit)));
    row += more_rows, unit += more_units;
    if (unit >= units) unit -= units, ++row;
  }
}

template <bool kStore, class Element>
PYPERF_DEVICE void move_lanes(unsigned char* shared, int pitch, unsigned char* global, const int64_t* offsets, int rows,
                              int count, int64_t stride) {
  const int row = int(threadIdx.x);
  if (row >= rows) return;
  global += offsets[row];
#pragma unroll 4
  for (int j = 0; j < count; ++j)
    move_unit<kStore, Element>(shared + row * pitch + j * int(sizeof(Element)), global + j * stride);
}

// One part of `rows` rows. `global` is the tensor (flat: the first row), offsets are those of the rows, in bytes.
template <bool kStore>
PYPERF_DEVICE void move_part(const RowPart& part, unsigned char* shared, int pitch, unsigned char* global,
                             const int64_t* offsets, int rows) {
  if (part.count == 0) return;
  shared += part.at;
  if (part.copy == RowCopy::flat) {
    const int bytes = rows * pitch;
    if (part.unit == 2) return move_range<kStore, uint16_t>(shared, global, bytes);
    if (part.unit == 4) return move_range<kStore, uint32_t>(shared, global, bytes);
    return move_range<kStore, uint64_t>(shared, global, bytes);
  }
  if (part.copy == RowCopy::rows) {
    const int units = part.count * int(part.stride) / part.unit;
    if (part.unit == 2) return move_rows<kStore, uint16_t>(shared, pitch, global, offsets, rows, units);
    if (part.unit == 4) return move_rows<kStore, uint32_t>(shared, pitch, global, offsets, rows, units);
    return move_rows<kStore, uint64_t>(shared, pitch, global, offsets, rows, units);
  }
  if (part.unit == 2)
    return move_lanes<kStore, uint16_t>(shared, pitch, global, offsets, rows, part.count, part.stride);
  if (part.unit == 4)
    return move_lanes<kStore, uint32_t>(shared, pitch, global, offsets, rows, part.count, part.stride);
  move_lanes<kStore, uint64_t>(shared, pitch, global, offsets, rows, part.count, part.stride);
}

}  // namespace pyperf::cuda
