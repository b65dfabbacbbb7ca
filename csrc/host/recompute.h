// Schedules of activation recompute for a chain of blocks under a budget of bytes. No Python and no torch here.
//
// Sub-problem (s, t, m): given the input of block s and the gradient of the output of block t, train blocks s, ..., t
// in m bytes. Either s runs with history, by one of its options, or s, ..., j - 1 run without and keep their last
// output, j, ..., t are trained, then s, ..., j - 1. (Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova, HAL
// hal-02352969.) All tables hold extra time: what lies above one cheapest forward with history and one backward of each
// block.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace pyperf::recompute {

struct Option {
  double forward, backward;
  int64_t saved, history_peak, backward_peak;
  double extra;  // above the cheapest option of the block
};

struct Block {
  double forward;
  int64_t output, forward_peak;
  bool recomputable;
  std::vector<Option> options;
  double seconds;  // forward and backward of the cheapest option
};

struct Chain {
  Chain(std::vector<Block> blocks, double frame_seconds, std::vector<int> kinds);
  int size() const { return static_cast<int>(blocks.size()); }
  // Time of running s, ..., j - 1 once more.
  double again(int s, int j) const { return frame_seconds + until[j] - until[s]; }

  std::vector<Block> blocks;
  double frame_seconds;
  std::vector<int> kinds;     // equal numbers for equal blocks
  std::vector<double> until;  // sums of forward
  double seconds = 0;         // of all blocks, without recomputation
};

constexpr int kNoSplit = -1;

struct Node {
  int first, last, split, option;
};
using Plan = std::vector<Node>;  // in preorder

enum class What { forward, replay, history, backward };

struct Event {
  What what;
  int block;
  double start, seconds;
  int64_t peak, after;
};

struct Limit : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a long search reports to: it ends the search by an exception when a limit is reached or the caller says so.
class Progress {
 public:
  Progress(double seconds, double work, std::function<void()> poll);
  // `units`: about a nanosecond each.
  void work(int64_t units) {
    done_ += units;
    if (done_ >= next_) check();
  }

 private:
  void check();
  using Clock = std::chrono::steady_clock;
  Clock::time_point deadline_, polled_;
  double most_work_;
  int64_t done_ = 0, next_ = 0;
  std::function<void()> poll_;
};

// Every event of a plan, in order; invalid_argument where the nodes are no plan of this chain.
void simulate(const Chain& chain, const Plan& plan, const std::function<void(const Event&)>& each);

struct Cost {
  int64_t peak;
  double seconds;
};
Cost cost(const Chain& chain, const Plan& plan);

// Of all plans one with the least peak.
Plan least_memory(const Chain& chain, Progress& progress);

enum class Rounding { down, nearest, up };

struct Slots {
  int64_t bytes;  // of one slot
  Rounding rounding;
  int64_t of(int64_t size) const {
    const int64_t add = rounding == Rounding::up ? bytes - 1 : rounding == Rounding::nearest ? bytes / 2 : 0;
    return (size + add) / bytes;
  }
};

// The best plan whose bytes fit that a table has, its root given `m` = 0, ..., top slots; empty where there is none.
template <class Table>
Plan fitting(const Chain& chain, const Table& table, int64_t budget) {
  Plan best;
  double seconds = 0;
  const auto fits = [&](int64_t m) {
    Plan plan = table.plan(m);
    if (plan.empty()) return true;
    const Cost found = cost(chain, plan);
    if (found.peak > budget) return false;
    if (best.empty() || found.seconds < seconds) {
      best = std::move(plan);
      seconds = found.seconds;
    }
    return true;
  };
  int64_t low = 0, high = table.top() + 1;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (fits(middle) ? low : high) = middle;
  }
  // Rounding to nearest makes the peak no monotone function of m.
  for (int64_t m = high, end = std::min(high + 8, table.top() + 1); m < end; m++) fits(m);
  return best;
}

// Flat schedules: each block runs without history at most once. The spine of a schedule is what its root and the right
// children from there say: for each block, kept by an option or part of a segment that runs again.
class Spine {
 public:
  enum class Segments {
    kept,        // a segment that runs again keeps all of its blocks, by one of a few sets of options
    kept_bound,  // not above the extra time of any flat schedule
    any_bound,   // not above the extra time of any persistent schedule
  };
  // Values are found up to `most_extra`, the extra time of a schedule that is known; what is above stays above.
  Spine(const Chain& chain, Slots slots, int64_t top, Segments segments, Progress& progress,
        double most_extra = std::numeric_limits<double>::infinity());
  int64_t top() const { return top_; }
  double extra(int64_t m) const { return row(0)[m]; }
  Plan plan(int64_t m) const;

 private:
  struct Left;
  class Prices;
  const float* row(int s) const { return values_.data() + static_cast<size_t>(s) * (top_ + 1); }
  float* row(int s) { return values_.data() + static_cast<size_t>(s) * (top_ + 1); }

  const Chain& chain_;
  Slots slots_;
  int64_t top_;
  std::vector<std::vector<int>> levels_;  // sets of options, one for each block
  std::vector<float> values_;             // extra time of blocks s, ... in m slots, by s and m
};

// All persistent schedules with an extra time of at most `most_extra`, by slots.
class Table {
 public:
  Table(const Chain& chain, Slots slots, int64_t top, double most_extra, int64_t memory_limit, Progress& progress);
  int64_t top() const { return top_; }
  double extra(int64_t m) const;
  Plan plan(int64_t m) const;

 private:
  // Extra time in m slots, for first <= m < first + values.size(); infinite before, the last one from there on.
  struct Row {
    int64_t first;
    std::vector<float> values;
    int64_t end() const { return first + static_cast<int64_t>(values.size()); }
    float at(int64_t m) const;
  };
  const Row* row(int s, int t) const;
  Row fill(int s, int t, double most) const;

  const Chain& chain_;
  Slots slots_;
  int64_t top_;
  double most_extra_;
  std::vector<int> index_;  // of the row of s, t; equal blocks share theirs
  std::vector<Row> rows_;
  mutable std::vector<float> scratch_;
  mutable int64_t touched_ = 0;
};

// The same without slots: extra time as a step function of bytes.
class Steps {
 public:
  Steps(const Chain& chain, int64_t budget, double most_extra, int64_t memory_limit, Progress& progress);
  Plan plan() const;

 private:
  struct Step {
    int64_t bytes;
    double extra;
    int split, option;
  };
  const Chain& chain_;
  int64_t budget_;
  std::vector<std::vector<Step>> rows_;
};

}  // namespace pyperf::recompute
