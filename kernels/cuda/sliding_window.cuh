// Sliding-window extrema and what follows from them, on CUDA. Nothing here allocates, synchronises or keeps state:
// the caller brings a workspace of `..._workspace_bytes(problem)` bytes (it may be null where that is 0).
#pragma once

#include "sliding_window_huge.cuh"
#include "sliding_window_segments.cuh"
#include "sliding_window_sums_tiles.cuh"
#include "sliding_window_tiles.cuh"
#include "sliding_window_winners.cuh"

namespace pyperf::sliding_window {

enum class ExtremaPath { tiles, huge, segments };

// Tiles compute every dense output: with few of them wanted, or with short rows, one thread a segment does less.
template <class Key>
ExtremaPath extrema_path(const Extrema<Key>& p) {
  constexpr int64_t kSmallestTile = 512;
  constexpr int64_t kTileStride = 16;
  const Windows& w = p.windows;
  const bool worth_tiles = dense_outputs(w) >= kSmallestTile && (w.stride <= kTileStride || w.stride <= w.window);
  if (worth_tiles && tiles_fit(p)) return ExtremaPath::tiles;
  return worth_tiles && huge_fits(p) ? ExtremaPath::huge : ExtremaPath::segments;
}

template <class Key>
int64_t extrema_workspace_bytes(const Extrema<Key>& p) {
  return extrema_path(p) == ExtremaPath::huge ? huge_workspace_bytes(p) : 0;
}

template <class Key>
cudaError_t extrema(const Extrema<Key>& p, void* workspace, cudaStream_t stream) {
  switch (extrema_path(p)) {
    case ExtremaPath::tiles: return extrema_by_tiles(p, stream);
    case ExtremaPath::huge: return extrema_by_huge(p, workspace, stream);
    default: return extrema_by_segments(p, stream);
  }
}

template <class T>
int64_t winner_sums_workspace_bytes(const WinnerSums<T>& p) {
  return sums_tiles_fit(p) ? 0 : chunked_sums_workspace_bytes(p);
}

template <class T>
cudaError_t winner_sums(const WinnerSums<T>& p, void* workspace, cudaStream_t stream) {
  return sums_tiles_fit(p) ? winner_sums_by_tiles(p, stream) : winner_sums_by_chunks(p, workspace, stream);
}

}  // namespace pyperf::sliding_window
