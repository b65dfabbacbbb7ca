// Square blocks of vectors turned about their diagonal, in registers; stamped once for each SIMD level (simd_levels.h).
// Prelude: <cstddef>, <utility>.

template <int kHalf, bool kUpper, class V, size_t... kLane>
PYPERF_HD V half_swapped(V a, V b, std::index_sequence<kLane...>) {
  constexpr int L = int(sizeof...(kLane));
  if constexpr (kUpper)
    return __builtin_shufflevector(a, b, int(kLane & kHalf ? L + kLane : kLane + kHalf)...);
  else
    return __builtin_shufflevector(a, b, int(kLane & kHalf ? L + kLane - kHalf : kLane)...);
}

// rows[i][j] and rows[j][i] change places.
template <int L, int kHalf = 1, class V>
PYPERF_HD void transpose(V* rows) {
  for (int i = 0; i < L; ++i) {
    if (i & kHalf) continue;
    const V low = half_swapped<kHalf, false>(rows[i], rows[i + kHalf], std::make_index_sequence<L>());
    rows[i + kHalf] = half_swapped<kHalf, true>(rows[i], rows[i + kHalf], std::make_index_sequence<L>());
    rows[i] = low;
  }
  if constexpr (2 * kHalf < L) transpose<L, 2 * kHalf>(rows);
}
