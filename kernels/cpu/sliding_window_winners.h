// What follows from the winners of sliding windows on a CPU: gradient sums, gathers, indices. Loops over rows; what
// pays a vector at a time is in sliding_window_chunks.h, and reaches these loops as functions of one SIMD level,
// `chunks`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "../math/half.h"
#include "../math/sliding_window.h"

namespace pyperf::sliding_window {

constexpr int64_t kLaneBlock = 16;
constexpr int64_t kElementGrain = 16 << 10;  // elements worth a thread of their own

// kChunk neighbouring outputs of a phase.
template <class T, class Offset>
struct RunStretch {
  const Offset* taps;
  const T* grad;
  int64_t start;  // position of the first output
  int64_t step, dilation, lowest, beyond;
};
template <class A>
struct RunState {
  int64_t run;
  A total;
};
template <class A, class T, class Out, class Offset>
using SumChunk = bool (*)(const RunStretch<T, Offset>&, RunState<A>&, Out*);

// Position of the winner of each output of one phase, or kNoWinner.
template <class Offset>
struct Winners {
  static constexpr int64_t kNoWinner = INT64_MIN;

  const Offset* offsets;
  int64_t stride;  // between outputs of the phase
  int64_t start, step, dilation;
  int64_t lowest, beyond;  // offsets that lead out of the row, which no forward makes, count as none

  Winners(const Windows& w, const Phases& phases, int64_t phase, const void* offsets, int64_t offsets_stride)
      : offsets(static_cast<const Offset*>(offsets) + phase * offsets_stride),
        stride(phases.count * offsets_stride),
        start(w.start(phase)),
        step(phases.count * w.stride),
        dilation(w.dilation),
        lowest(w.edge == Edge::constant ? 0 : -w.left),
        beyond(w.edge == Edge::constant ? w.length : w.padded_length() - w.left) {}

  int64_t operator()(int64_t c) const {
    const Offset tap = offsets[c * stride];
    const int64_t position = start + c * step + int64_t(tap) * dilation;
    return tap == Offset(-1) || position < lowest || position >= beyond ? kNoWinner : position;
  }
  // kChunk outputs from c on, whose distances fit the integers that are used there.
  template <class T>
  RunStretch<T, Offset> stretch(const T* grad, int64_t c) const {
    return {offsets + c, grad + c, start + c * step, step, dilation, lowest, beyond};
  }
  bool stretches(int64_t window) const { return stride == 1 && window < (1 << 28) / dilation && step < (1 << 20); }
};

// value where keep, else -0, the neutral element of addition; by a mask, because compilers make a select a branch here,
// and where runs end no processor can foresee.
template <class A>
A kept(A value, bool keep) {
  using Bits = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;
  const Bits mask = Bits(0) - Bits(keep);
  Bits bits;
  memcpy(&bits, &value, sizeof bits);
  bits = (bits & mask) | (~mask & Bits(Bits(1) << (8 * sizeof(A) - 1)));
  memcpy(&value, &bits, sizeof bits);
  return value;
}

// Where sums go: a row of gradients, rounded on the way, or a row of sums in the accumulation type.
template <class A, class T>
struct SumRow {
  T* row;
  int64_t stride;

  void put(int64_t position, A sum) const { row[position * stride] = Accumulate<T>::store(sum); }
};

// Writes every run that starts at an output in [begin, end) of a phase of `count` outputs, and zeros at the positions
// between: those after the previous winner, and up to `stop` if the phase ends here. Neighbouring ranges can so be done
// by different threads, with the same result.
//
// The sum so far is stored at every output, the last one of a run wins: no branch depends on where runs end.
// `sum_chunk` does the same for whole chunks; null where operands have gaps.
template <class A, class T, class Out, class Offset>
void sum_runs(const Winners<Offset>& winner, const T* grad, int64_t grad_stride, int64_t begin, int64_t end,
              int64_t count, int64_t first_position, int64_t stop, const SumRow<A, Out>& to,
              SumChunk<A, T, Out, Offset> sum_chunk) {
  constexpr int64_t none = Winners<Offset>::kNoWinner;
  constexpr A nothing = A(-0.0);
  constexpr int64_t kCleared = 1024;  // outputs whose winners' surroundings are cleared at once, in the cache
  int64_t before = begin - 1;
  while (before >= 0 && winner(before) == none) --before;
  const int64_t previous = before >= 0 ? winner(before) : none;
  int64_t blank = previous == none ? first_position : previous + winner.dilation;
  const auto clear_to = [&](int64_t limit) {
    if (winner.dilation == 1 && to.stride == 1 && blank < limit) {
      std::fill(to.row + blank, to.row + limit, Accumulate<Out>::store(A(0)));
      blank = limit;
    }
    for (; blank < limit; blank += winner.dilation) to.put(blank, A(0));
  };

  int64_t c = begin;
  const auto continues = [&](int64_t position, int64_t run) { return position == run || position == none; };
  if (previous != none)
    while (c < end && continues(winner(c), previous)) ++c;  // the tail of a run that started before
  int64_t run = none;
  A leaf = nothing, chunk = nothing, total = nothing;
  const auto add = [&](int64_t position) {  // an output without a winner is passed over, also within a run
    const bool same = continues(position, run);
    leaf = kept(leaf, same) + kept(A(grad[c * grad_stride]), position != none);
    chunk = kept(chunk, same);
    total = kept(total, same);
    run = position == none ? run : position;
    if (run != none) to.put(run, total + (chunk + leaf));
    ++c;
    if (c % kLeaf == 0) {
      chunk += leaf;
      leaf = nothing;
      if (c % kChunk == 0) {
        total += chunk;
        chunk = nothing;
      }
    }
  };
  while (c < end) {
    const int64_t until = std::min(c + kCleared, end);
    int64_t last = until - 1;
    while (last >= c && winner(last) == none) --last;
    if (last >= c) clear_to(winner(last) + winner.dilation);
    while (c < until) {
      if (sum_chunk && c % kChunk == 0 && c + kChunk <= until) {
        RunState<A> state{run, total};
        if (sum_chunk(winner.stretch(grad, c), state, to.row)) {
          run = state.run, total = state.total;
          c += kChunk;
          continue;
        }
      }
      add(winner(c));
    }
  }
  while (run != none && c < count && continues(winner(c), run)) add(winner(c));
  if (end == count) clear_to(stop);
}

inline int64_t remainder(int64_t a, int64_t b) { return (a % b + b) % b; }

template <class T, class Offset, class Parallel, class Chunks>
void sum_rows(const WinnerSums<T>& p, const Parallel& parallel, const Chunks& chunks) {
  using A = typename Accumulate<T>::type;
  const Windows& w = p.windows;
  const Phases phases(w);
  const int64_t phase_count = std::min(phases.count, w.out_length);
  const int64_t longest = w.out_length ? phases.outputs(w, 0) : 0;
  // Positions that belong to no phase get their zeros first.
  if (phase_count < w.dilation) {
    parallel(p.rows.count * p.lanes, std::max<int64_t>(1, kElementGrain / std::max<int64_t>(1, w.length)), 0,
             [&](int64_t first, int64_t last, char*) {
               for (int64_t t = first; t < last; ++t) {
                 int64_t base[3];
                 p.rows.offsets(t / p.lanes, base);
                 T* to = p.grad_x + base[2] + t % p.lanes;
                 for (int64_t j = 0; j < w.length; ++j) to[j * p.grad_x_stride] = Accumulate<T>::store(A(0));
               }
             });
  }
  if (!phase_count) return;
  const int64_t unit = kChunk * 16, units = (longest + unit - 1) / unit;
  parallel(p.rows.count * p.lanes * phase_count * units,
           std::max<int64_t>(1, kElementGrain / std::min(unit, longest + 16)), 0,
           [&](int64_t first, int64_t last, char*) {
             for (int64_t t = first; t < last;) {
               const int64_t group = t / units, from = t % units, to = std::min(units, from + (last - t));
               t += to - from;
               const int64_t phase = group % phase_count, lane = group / phase_count % p.lanes;
               int64_t base[3];
               p.rows.offsets(group / phase_count / p.lanes, base);
               const int64_t count = phases.outputs(w, phase);
               if (from * unit >= count) continue;
               const Winners<Offset> winner(w, phases, phase, static_cast<const Offset*>(p.offsets) + base[1] + lane,
                                            p.offsets_stride);
               const SumRow<A, T> row{p.grad_x + base[2] + lane, p.grad_x_stride};
               const int64_t grad_stride = phases.count * p.grad_y_stride;
               const bool dense = winner.stretches(w.window) && grad_stride == 1 && row.stride == 1;
               sum_runs(winner, p.grad_y + base[0] + lane + phase * p.grad_y_stride, grad_stride, from * unit,
                        std::min(to * unit, count), count, remainder(w.start(phase), w.dilation), w.length, row,
                        dense ? chunks.template sum_chunk<A, T, T, Offset>() : nullptr);
             }
           });
}

// Where padding reads elements, winners are ordered in the padded row only: sum there, then fold the edges.
template <class T, class Offset, class Parallel, class Chunks>
void sum_folded_rows(const WinnerSums<T>& p, const Parallel& parallel, const Chunks& chunks) {
  using A = typename Accumulate<T>::type;
  const Windows& w = p.windows;
  const Phases phases(w);
  const int64_t padded = w.padded_length();
  parallel(p.rows.count * p.lanes, std::max<int64_t>(1, kElementGrain / (padded + 16)),
           (padded + w.length) * int64_t(sizeof(A)), [&](int64_t first, int64_t last, char* scratch) {
             A* sums = reinterpret_cast<A*>(scratch);
             A* folded = sums + padded;
             for (int64_t t = first; t < last; ++t) {
               int64_t base[3];
               p.rows.offsets(t / p.lanes, base);
               const int64_t lane = t % p.lanes;
               std::fill(sums, sums + padded, A(0));
               for (int64_t phase = 0; phase < std::min(phases.count, w.out_length); ++phase) {
                 const int64_t count = phases.outputs(w, phase);
                 const Winners<Offset> winner(w, phases, phase, static_cast<const Offset*>(p.offsets) + base[1] + lane,
                                              p.offsets_stride);
                 const int64_t grad_stride = phases.count * p.grad_y_stride;
                 const bool dense = winner.stretches(w.window) && grad_stride == 1;
                 sum_runs(winner, p.grad_y + base[0] + lane + phase * p.grad_y_stride, grad_stride, 0, count, count,
                          w.start(phase), w.start(phase), SumRow<A, A>{sums + w.left, 1},
                          dense ? chunks.template sum_chunk<A, T, A, Offset>() : nullptr);
               }
               for (int64_t j = 0; j < w.length; ++j) folded[j] = j + w.left < padded ? sums[j + w.left] : A(0);
               for (int64_t i = 0; i < padded; ++i) {
                 const int64_t position = i - w.left;
                 if (position < 0 || position >= w.length) folded[w.source(position)] += sums[i];
               }
               T* grad_x = p.grad_x + base[2] + lane;
               for (int64_t j = 0; j < w.length; ++j) grad_x[j * p.grad_x_stride] = Accumulate<T>::store(folded[j]);
             }
           });
}

// visit(typed null pointer of the offset type)
template <class Visit>
void with_offset_type(OffsetType type, const Visit& visit) {
  if (type == OffsetType::u8) visit(static_cast<const uint8_t*>(nullptr));
  if (type == OffsetType::i16) visit(static_cast<const int16_t*>(nullptr));
  if (type == OffsetType::i32) visit(static_cast<const int32_t*>(nullptr));
}

template <class T, class Parallel, class Chunks>
void winner_sums(const WinnerSums<T>& p, const Parallel& parallel, const Chunks& chunks) {
  if (p.rows.count == 0 || p.lanes == 0 || p.windows.length == 0) return;
  with_offset_type(p.offset, [&](auto* type) {
    using Offset = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    if (p.windows.edge == Edge::constant) {
      sum_rows<T, Offset>(p, parallel, chunks);
    } else {
      sum_folded_rows<T, Offset>(p, parallel, chunks);
    }
  });
}

// Calls visit(output index, row bases, position of its source or -1) for every output of every lane.
template <class Offset, int N, class Parallel, class Visit>
void visit_winners(const Windows& w, const StridedRows<N>& rows, int64_t lanes, const Offset* offsets, int operand,
                   int64_t stride, const Parallel& parallel, const Visit& visit) {
  parallel(rows.count * w.out_length, std::max<int64_t>(1, kElementGrain / std::max<int64_t>(1, lanes)), 0,
           [&](int64_t first, int64_t last, char*) {
             int64_t base[N];
             for (int64_t t = first; t < last; ++t) {
               const int64_t i = t % w.out_length;
               if (t == first || i == 0) rows.offsets(t / w.out_length, base);
               const Offset* taps = offsets + base[operand] + i * stride;
               for (int64_t l = 0; l < lanes; ++l) {
                 const int64_t source =
                     taps[l] == Offset(-1) ? -1 : w.source(w.start(i) + int64_t(taps[l]) * w.dilation);
                 visit(i, l, base, source);
               }
             }
           });
}

// Where the outputs of a row and their positions are neighbours: visit(bases, first output, outputs).
template <int N, class Parallel, class Visit>
void visit_stretches(const Windows& w, const StridedRows<N>& rows, const Parallel& parallel, const Visit& visit) {
  const int64_t units = (w.out_length + kElementGrain - 1) / kElementGrain;
  parallel(rows.count * units, std::max<int64_t>(1, kElementGrain / w.out_length), 0,
           [&](int64_t first, int64_t last, char*) {
             for (int64_t t = first; t < last; ++t) {
               int64_t base[N];
               rows.offsets(t / units, base);
               const int64_t from = t % units * kElementGrain;
               visit(base, from, std::min(kElementGrain, w.out_length - from));
             }
           });
}
inline bool in_stretches(const Windows& w, int64_t lanes) {
  return w.edge == Edge::constant && lanes == 1 && w.stride == 1 && w.dilation == 1 && w.length > 0;
}

template <class Bits, class Parallel, class Chunks>
void winner_gather(const WinnerGather<Bits>& p, const Parallel& parallel, const Chunks& chunks) {
  const Windows& w = p.windows;
  if (p.rows.count == 0 || p.lanes == 0 || w.out_length == 0) return;
  with_offset_type(p.offset, [&](auto* type) {
    using Offset = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    if (in_stretches(w, p.lanes) && p.offsets_stride == 1 && p.values_stride == 1 && p.y_stride == 1) {
      const auto gather_stretch = chunks.template gather_stretch<Bits, Offset>();
      visit_stretches(w, p.rows, parallel, [&](const int64_t (&base)[3], int64_t from, int64_t n) {
        gather_stretch(static_cast<const Offset*>(p.offsets) + base[1] + from, p.values + base[0], p.y + base[2] + from,
                       n, w.start(from), w.length);
      });
      return;
    }
    visit_winners(w, p.rows, p.lanes, static_cast<decltype(type)>(p.offsets), 1, p.offsets_stride, parallel,
                  [&](int64_t i, int64_t lane, const int64_t (&base)[3], int64_t source) {
                    p.y[base[2] + lane + i * p.y_stride] =
                        source < 0 ? Bits(0) : p.values[base[0] + lane + source * p.values_stride];
                  });
  });
}

template <class Parallel, class Chunks>
void winner_index(const WinnerIndex& p, const Parallel& parallel, const Chunks& chunks) {
  const Windows& w = p.windows;
  if (p.rows.count == 0 || p.lanes == 0 || w.out_length == 0) return;
  with_offset_type(p.offset, [&](auto* type) {
    using Offset = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    if (in_stretches(w, p.lanes) && p.offsets_stride == 1 && p.index_stride == 1) {
      const auto index_stretch = chunks.template index_stretch<Offset>();
      visit_stretches(w, p.rows, parallel, [&](const int64_t (&base)[2], int64_t from, int64_t n) {
        index_stretch(static_cast<const Offset*>(p.offsets) + base[0] + from, p.index + base[1] + from, n,
                      w.start(from), w.length);
      });
      return;
    }
    visit_winners(w, p.rows, p.lanes, static_cast<decltype(type)>(p.offsets), 0, p.offsets_stride, parallel,
                  [&](int64_t i, int64_t lane, const int64_t (&base)[2], int64_t source) {
                    p.index[base[1] + lane + i * p.index_stride] = source;
                  });
  });
}

}  // namespace pyperf::sliding_window
