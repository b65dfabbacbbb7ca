// Sliding-window extrema and what follows from them, on CUDA. Nothing here allocates, synchronises or keeps state:
// the caller brings a workspace of `..._workspace_bytes(problem)` bytes (it may be null where that is 0).
#pragma once

#include "sliding_window_segments.cuh"
#include "sliding_window_sums.cuh"
#include "sliding_window_tiles.cuh"
#include "sliding_window_winners.cuh"

namespace pyperf::sliding_window {

template <class Key>
int64_t extrema_workspace_bytes(const Extrema<Key>&) {
  return 0;
}

template <class Key>
cudaError_t extrema(const Extrema<Key>& p, void*, cudaStream_t stream) {
  return extrema_by_segments(p, stream);
}

template <class T>
int64_t winner_sums_workspace_bytes(const WinnerSums<T>& p) {
  return chunked_sums_workspace_bytes(p);
}

template <class T>
cudaError_t winner_sums(const WinnerSums<T>& p, void* workspace, cudaStream_t stream) {
  return winner_sums_by_chunks(p, workspace, stream);
}

}  // namespace pyperf::sliding_window
