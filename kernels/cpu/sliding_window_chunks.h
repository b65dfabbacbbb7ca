// What sliding_window_winners.h does a vector at a time. Stamped once for each SIMD level (simd_levels.h); prelude:
// sliding_window_winners.h.
#include "transpose.h"

template <class A>
struct SumLanes {
  static constexpr int kLanes = PYPERF_VECTOR_BYTES / int(sizeof(A));
  using Place = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  typedef A Sums __attribute__((vector_size(PYPERF_VECTOR_BYTES)));
  typedef Place Places __attribute__((vector_size(PYPERF_VECTOR_BYTES)));
};

// The sums of kChunk outputs, a lane for each of their leaves. `state` holds the run that goes on and its sum so far.
// False, and nothing written, where an output has no winner.
template <class A, class T, class Out, class Offset>
bool sum_chunk(const RunStretch<T, Offset>& outputs, RunState<A>& state, Out* to) {
  using Lanes = SumLanes<A>;
  using Place = typename Lanes::Place;
  using Places = typename Lanes::Places;
  using Sums = typename Lanes::Sums;
  constexpr int L = Lanes::kLanes, kLeaves = int(kChunk / kLeaf), kSteps = int(kLeaf);
  static_assert(kLeaves % L == 0 && kSteps % L == 0);

  Place places[kChunk];  // of winners, counted from outputs.start
  {
    const Place step = Place(outputs.step), dilation = Place(outputs.dilation);
    const Place lowest = Place(std::max<int64_t>(outputs.lowest - outputs.start, std::numeric_limits<Place>::min()));
    const Place beyond = Place(std::min<int64_t>(outputs.beyond - outputs.start, std::numeric_limits<Place>::max()));
    Place without = 0;
    for (int i = 0; i < kChunk; ++i) {
      const Place tap = Place(outputs.taps[i]), place = tap * dilation + i * step;
      places[i] = place;
      without |= Place(outputs.taps[i] == Offset(-1)) | Place(place < lowest) | Place(place >= beyond);
    }
    if (without) return false;
  }
  A grads[kChunk];
  for (int i = 0; i < kChunk; ++i) grads[i] = A(outputs.grad[i]);

  // Step by step along the leaves: where each output's winner is, and the sum of its run within the leaf so far.
  Place at[kChunk];
  A sums[kChunk], first[kLeaves], last[kLeaves];
  const Sums nothing = -Sums{};  // -0, the neutral element
  for (int group = 0; group < kLeaves; group += L) {
    Sums leaf = nothing, front = nothing;
    Places before = Places{} - 1, in_front = Places{} - 1;
    for (int block = 0; block < kSteps; block += L) {
      Places place[L];
      Sums grad[L];
      for (int l = 0; l < L; ++l) {
        memcpy(&place[l], places + (group + l) * kSteps + block, sizeof place[l]);
        memcpy(&grad[l], grads + (group + l) * kSteps + block, sizeof grad[l]);
      }
      transpose<L>(place);
      transpose<L>(grad);
      for (int i = 0; i < L; ++i) {
        if (block + i == 0) before = place[0];
        const Places same = place[i] == before;
        leaf = (same ? leaf : nothing) + grad[i];
        in_front &= same;
        front = in_front ? leaf : front;
        before = place[i];
        memcpy(at + (block + i) * kLeaves + group, &place[i], sizeof place[i]);
        memcpy(sums + (block + i) * kLeaves + group, &leaf, sizeof leaf);
      }
    }
    memcpy(first + group, &front, sizeof front);
    memcpy(last + group, &leaf, sizeof leaf);
  }
  Out rounded[kChunk];
  for (int i = 0; i < kChunk; ++i) rounded[i] = Accumulate<Out>::store(sums[i]);
  Out* const row = to + outputs.start;
  for (int i = 0; i < kChunk; ++i) row[at[i]] = rounded[i];  // the last one of a run stays

  // The runs that cross from leaf to leaf.
  A chunk = A(-0.0);
  for (int i = 0; i < kLeaves; ++i) {
    const Place front = places[i * kSteps], back = places[i * kSteps + kSteps - 1];
    const bool same = outputs.start + front == state.run, single = front == back;
    chunk = kept(chunk, same);
    state.total = kept(state.total, same);
    row[back] = Accumulate<Out>::store(last[i]);
    row[front] = Accumulate<Out>::store(state.total + (chunk + first[i]));
    chunk = kept(chunk, single) + last[i];
    state.total = kept(state.total, single);
    state.run = outputs.start + back;
  }
  state.total += chunk;
  return true;
}

// index[i] = the position of each output's winner, -1 where there is none.
template <class Offset>
void index_stretch(const Offset* taps, int64_t* index, int64_t n, int64_t start, int64_t length) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t position = start + i + int64_t(taps[i]);
    index[i] = taps[i] != Offset(-1) && uint64_t(position) < uint64_t(length) ? position : -1;
  }
}

// y[i] = the value at each output's winner, zero bits where there is none.
template <class Bits, class Offset>
void gather_stretch(const Offset* taps, const Bits* values, Bits* y, int64_t n, int64_t start, int64_t length) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t position = start + i + int64_t(taps[i]);
    const bool found = taps[i] != Offset(-1) && uint64_t(position) < uint64_t(length);
    const Bits value = values[found ? position : 0];
    y[i] = found ? value : Bits(0);
  }
}
