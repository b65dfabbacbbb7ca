#include "recompute.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <unordered_map>
#include <utility>

namespace pyperf::recompute {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kGroup = 64;  // slots that are looked at together before they are gone through one by one

// best[i] = min(best[i], (add + right[i]) + left(i)) for 0 <= i < n. All three fall with i, so that a group of slots
// can only gain where the candidate at its end is below what is there at its beginning. Returns the work done.
template <class Left>
inline int64_t relax(float* best, const float* right, float add, Left left, int64_t n) {
  int64_t done = 0;
  for (int64_t begin = 0; begin < n; begin += kGroup) {
    const int64_t end = std::min(begin + kGroup, n);
    done += 4;
    if ((add + right[end - 1]) + left(end - 1) >= best[begin]) continue;
    done += (end - begin) / 4;
    for (int64_t i = begin; i < end; i++) {
      const float candidate = (add + right[i]) + left(i);
      best[i] = candidate < best[i] ? candidate : best[i];
    }
  }
  return done;
}

int64_t entry_peak(const Option& option, int64_t gradient) {
  return std::max(gradient + option.history_peak, option.backward_peak);
}

// The cheapest option, and of those the one that keeps least.
const Option& cheapest(const Block& block) {
  return *std::min_element(block.options.begin(), block.options.end(), [](const Option& a, const Option& b) {
    return std::pair(a.extra, a.saved) < std::pair(b.extra, b.saved);
  });
}

template <class Of>
int64_t least(const Block& block, Of of) {
  int64_t found = std::numeric_limits<int64_t>::max();
  for (const Option& option : block.options) found = std::min(found, of(option));
  return found;
}

}  // namespace

Chain::Chain(std::vector<Block> given, double frame_seconds, std::vector<int> kinds)
    : blocks(std::move(given)), frame_seconds(frame_seconds), kinds(std::move(kinds)), until(blocks.size() + 1, 0) {
  for (size_t k = 0; k < blocks.size(); k++) {
    Block& block = blocks[k];
    until[k + 1] = until[k] + block.forward;
    block.seconds = std::numeric_limits<double>::infinity();
    for (const Option& o : block.options) block.seconds = std::min(block.seconds, o.forward + o.backward);
    for (Option& o : block.options) o.extra = o.forward + o.backward - block.seconds;
    seconds += block.seconds;
  }
}

Progress::Progress(double seconds, double work, std::function<void()> poll)
    : deadline_(seconds < 1e8 ? Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                                   std::chrono::duration<double>(std::max(seconds, 0.0)))
                              : Clock::time_point::max()),
      polled_(Clock::now()),
      most_work_(work),
      poll_(std::move(poll)) {}

void Progress::check() {
  next_ = done_ + 1'000'000;
  const auto now = Clock::now();
  if (now - polled_ > std::chrono::milliseconds(20)) {
    polled_ = now;
    poll_();
  }
  if (now >= deadline_) throw Limit("time");
  if (static_cast<double>(done_) > most_work_) throw Limit("work");
}

void simulate(const Chain& chain, const Plan& plan, const std::function<void(const Event&)>& each) {
  struct Todo {
    int first, last;
    const Option* backward;  // of `first`, or null: train first, ..., last
    int64_t live;
  };
  const auto& blocks = chain.blocks;
  std::vector<bool> ran(blocks.size(), false);
  std::vector<Todo> stack{{0, chain.size() - 1, nullptr, 0}};
  size_t next = 0;
  double now = 0;
  const auto event = [&](What what, int k, double seconds, int64_t peak, int64_t after) {
    each({what, k, now, seconds, peak, after});
    now += seconds;
    ran[k] = true;
  };
  while (!stack.empty()) {
    const Todo todo = stack.back();
    stack.pop_back();
    const int s = todo.first, t = todo.last;
    const int64_t gradient = blocks[t].output;
    if (todo.backward) {
      event(What::backward, s, todo.backward->backward, todo.live + todo.backward->backward_peak,
            todo.live + (s ? blocks[s - 1].output : 0));
      continue;
    }
    if (next == plan.size()) throw std::invalid_argument("nodes end before every block is trained");
    const Node& node = plan[next++];
    const auto where = "node " + std::to_string(next - 1);
    if (node.first != s || node.last != t) {
      throw std::invalid_argument(where + " must train blocks " + std::to_string(s) + ", ..., " + std::to_string(t) +
                                  ", got " + std::to_string(node.first) + ", ..., " + std::to_string(node.last));
    }
    if (node.split == kNoSplit) {
      if (node.option < 0 || node.option >= static_cast<int>(blocks[s].options.size()))
        throw std::invalid_argument(where + " has option " + std::to_string(node.option) + ", which block " +
                                    std::to_string(s) + " does not");
      const Option& option = blocks[s].options[node.option];
      event(What::history, s, option.forward, todo.live + gradient + option.history_peak,
            todo.live + gradient + option.saved);
      stack.push_back({s, s, &option, todo.live});
      if (s < t) stack.push_back({s + 1, t, nullptr, todo.live + option.saved});
      continue;
    }
    if (node.split <= s || node.split > t)
      throw std::invalid_argument(where + " must be split behind its first block, got " + std::to_string(node.split));
    int64_t input = 0;
    for (int k = s; k < node.split; k++) {
      if (!blocks[k].recomputable)
        throw std::invalid_argument(where + " runs block " + std::to_string(k) + " again, which is not recomputable");
      event(ran[k] ? What::replay : What::forward, k, blocks[k].forward + (k == s ? chain.frame_seconds : 0),
            todo.live + gradient + input + blocks[k].forward_peak, todo.live + gradient + blocks[k].output);
      input = blocks[k].output;
    }
    stack.push_back({s, node.split - 1, nullptr, todo.live});
    stack.push_back({node.split, t, nullptr, todo.live + input});
  }
  if (next != plan.size()) throw std::invalid_argument("there are more nodes than the schedule has");
}

Cost cost(const Chain& chain, const Plan& plan) {
  Cost found{0, 0};
  simulate(chain, plan, [&](const Event& event) {
    found.peak = std::max(found.peak, event.peak);
    found.seconds += event.seconds;
  });
  return found;
}

Plan least_memory(const Chain& chain, Progress& progress) {
  struct Choice {
    int64_t bytes;
    int split, option;
  };
  const auto& blocks = chain.blocks;
  const int length = chain.size();
  std::vector<Choice> choices(static_cast<size_t>(length) * length);
  const auto at = [&](int s, int t) -> Choice& { return choices[static_cast<size_t>(s) * length + t]; };
  for (int t = 0; t < length; t++) {
    for (int s = t; s >= 0; s--) {
      Choice best{std::numeric_limits<int64_t>::max(), kNoSplit, 0};
      for (size_t o = 0; o < blocks[s].options.size(); o++) {
        const Option& option = blocks[s].options[o];
        int64_t bytes = entry_peak(option, blocks[t].output);
        if (s < t) bytes = std::max(bytes, option.saved + at(s + 1, t).bytes);
        if (bytes < best.bytes) best = {bytes, kNoSplit, static_cast<int>(o)};
      }
      int64_t run = 0, input = 0;
      int j = s + 1;
      for (; j <= t && blocks[j - 1].recomputable; j++) {
        run = std::max(run, blocks[t].output + input + blocks[j - 1].forward_peak);
        if (run >= best.bytes) break;
        input = blocks[j - 1].output;
        const int64_t bytes = std::max({run, input + at(j, t).bytes, at(s, j - 1).bytes});
        if (bytes < best.bytes) best = {bytes, j, 0};
      }
      progress.work(10 + 2 * (j - s));
      at(s, t) = best;
    }
  }
  Plan plan;
  std::vector<std::pair<int, int>> stack{{0, length - 1}};
  while (!stack.empty()) {
    const auto [s, t] = stack.back();
    stack.pop_back();
    const Choice& choice = at(s, t);
    plan.push_back({s, t, choice.split, choice.option});
    if (choice.split != kNoSplit) {
      stack.push_back({s, choice.split - 1});
      stack.push_back({choice.split, t});
    } else if (s < t) {
      stack.push_back({s + 1, t});
    }
  }
  return plan;
}

// ---- flat schedules ----

// What it takes to train s, ..., t once s, ..., t have run without history; t grows.
struct Spine::Left {
  struct Level {
    int64_t kept = 0, forward = 0, backward = 0;
    double extra = 0;
    void add(const Option& option) {
      forward = std::max(forward, kept + option.history_peak);
      backward = std::max(backward, kept + option.backward_peak);
      kept += option.saved;
      extra += option.extra;
    }
    int64_t need(int64_t gradient) const { return std::max(forward + gradient, backward); }
  };
  std::vector<Level> levels;
  Level floor;             // the least of everything over the options
  int64_t largest = 0;     // single block, at its least
  int64_t full = 0;        // bytes kept by the cheapest options of s, ..., t - 1, and the backward of t
  int64_t cheap_kept = 0;  // of s, ..., t
  // Extra time that one byte less costs at least.
  double keep_price = std::numeric_limits<double>::infinity(), any_price = keep_price;
  double next_keep_price = keep_price, next_any_price = keep_price;

  void add(const Block& block, const std::vector<std::vector<int>>& sets, int k) {
    for (size_t g = 0; g < sets.size(); g++) levels[g].add(block.options[sets[g][k]]);
    floor.add({0, 0, least(block, [](const Option& o) { return o.saved; }),
               least(block, [](const Option& o) { return o.history_peak; }),
               least(block, [](const Option& o) { return o.backward_peak; }), 0});
    largest = std::max(largest, least(block, [](const Option& o) { return entry_peak(o, 0); }));
    full = cheap_kept + least(block, [](const Option& o) { return o.backward_peak; });
    keep_price = next_keep_price;
    any_price = next_any_price;
    const int64_t kept = cheapest(block).saved;
    cheap_kept += kept;
    for (const Option& o : block.options)
      if (o.saved < kept) next_keep_price = std::min(next_keep_price, o.extra / static_cast<double>(kept - o.saved));
    next_any_price = std::min(next_any_price, next_keep_price);
    if (kept > 0) next_any_price = std::min(next_any_price, block.forward / static_cast<double>(kept));
  }
};

// What blocks 0, ..., s - 1 cost at least where they hold at most so many slots in the end: for every price of a slot,
// what they cost at least when they pay for their slots, less the price of all slots.
class Spine::Prices {
 public:
  Prices(const Chain& chain, Slots slots, int64_t top, double most_extra) : most_extra_(most_extra), top_(top) {
    if (most_extra == std::numeric_limits<double>::infinity()) return;
    // The price that tells most is where their bound for the whole chain is highest; the bound is concave in the price.
    double low = 0, high = 64 * most_extra / static_cast<double>(top + 1);
    for (int i = 0; i < 40; i++) {
      const double a = low + (high - low) / 3, b = high - (high - low) / 3;
      const auto bound = [&](double price) {
        return line(chain, slots, price).back() - price * static_cast<double>(top);
      };
      (bound(a) < bound(b) ? low : high) = bound(a) < bound(b) ? a : b;
    }
    for (double part : {0.5, 0.75, 0.9, 1.0, 1.1, 1.35, 2.0})
      lines_.emplace_back(low * part, line(chain, slots, low * part));
  }
  // For each m what blocks s, ... may cost in m slots that is of use when all may cost `most_extra`; a little more, for
  // rounding.
  void most(int s, std::vector<float>& most) const {
    const double extra = most_extra_ * (1 + 1e-4);
    std::fill(most.begin(), most.end(), static_cast<float>(extra));
    for (const auto& [price, sums] : lines_) {
      const auto start = static_cast<float>(extra - sums[s] + price * static_cast<double>(top_));
      const auto step = static_cast<float>(price);
      for (int m = 0; m <= static_cast<int>(top_); m++)
        most[m] = std::min(most[m], start - step * static_cast<float>(m));
    }
  }

 private:
  static std::vector<double> line(const Chain& chain, Slots slots, double price) {
    std::vector<double> sums{0};
    double running = std::numeric_limits<double>::infinity();  // inside a segment that runs again
    for (const Block& block : chain.blocks) {
      running = block.recomputable ? std::min(running, sums.back() + chain.frame_seconds) + block.forward
                                   : std::numeric_limits<double>::infinity();
      double least = running + price * static_cast<double>(slots.of(block.output));
      for (const Option& o : block.options)
        least = std::min(least, sums.back() + o.extra + price * static_cast<double>(slots.of(o.saved)));
      sums.push_back(least);
    }
    return sums;
  }

  double most_extra_;
  int64_t top_;
  std::vector<std::pair<double, std::vector<double>>> lines_;
};

Spine::Spine(const Chain& chain, Slots slots, int64_t top, Segments segments, Progress& progress, double most_extra)
    : chain_(chain), slots_(slots), top_(top) {
  const auto& blocks = chain.blocks;
  const int length = chain.size();
  std::vector<double> prices{0};
  for (const Block& block : blocks)
    for (const Option& o : block.options)
      if (const int64_t less = cheapest(block).saved - o.saved; less > 0)
        prices.push_back(o.extra / static_cast<double>(less));
  std::sort(prices.begin() + 1, prices.end());
  if (prices.size() > 5) {
    const size_t n = prices.size() - 1;
    prices = {0, prices[1 + n / 4], prices[1 + n / 2], prices[1 + 3 * n / 4], prices[n]};
  }
  if (segments == Segments::kept) {
    for (double price : prices) {
      auto& level = levels_.emplace_back();
      for (const Block& block : blocks) {
        const auto value = [&](const Option& o) {
          return std::pair(o.extra + price * static_cast<double>(o.saved), o.saved);
        };
        const auto found = std::min_element(block.options.begin(), block.options.end(),
                                            [&](const Option& a, const Option& b) { return value(a) < value(b); });
        level.push_back(static_cast<int>(found - block.options.begin()));
      }
    }
    levels_.erase(std::unique(levels_.begin(), levels_.end()), levels_.end());
  }

  values_.assign(static_cast<size_t>(length + 1) * (top + 1), 0);
  std::vector<float> most(top + 1);
  // Only between these a row holds less than `most`.
  std::vector<int64_t> first(length + 1, 0), last(length + 1, top);
  const int64_t gradient = blocks.back().output;
  const auto none = [](int64_t) { return 0.0f; };
  const Prices before(chain, slots, top, most_extra);
  for (int s = length - 1; s >= 0; s--) {
    float* best = row(s);
    before.most(s, most);
    std::copy(most.begin(), most.end(), best);
    int64_t done = top;
    for (const Option& o : blocks[s].options) {
      const int64_t shift = s + 1 < length ? slots.of(o.saved) : 0;
      const int64_t low = std::max(slots.of(entry_peak(o, gradient)), shift + first[s + 1]);
      const int64_t high = std::min(top, shift + last[s + 1]);
      if (low <= high)
        done += relax(best + low, row(s + 1) + (low - shift), static_cast<float>(o.extra), none, high + 1 - low);
    }
    Left left;
    left.levels.resize(levels_.size());
    int64_t run = 0, input = 0, end = top + 1;
    for (int j = s + 1; j < length && blocks[j - 1].recomputable; j++) {
      const Block& block = blocks[j - 1];
      run = std::max(run, gradient + input + block.forward_peak);
      input = block.output;
      left.add(block, levels_, j - 1);
      const double again = chain.again(s, j);
      const auto c = static_cast<float>(again);
      while (end > 0 && best[end - 1] <= c) end--;
      const int64_t shift = slots.of(input);
      const int64_t low = std::max(slots.of(run), shift + first[j]);
      done += 20;
      if (slots.of(run) >= end) break;
      const int64_t high = std::min(end, shift + last[j] + 1);
      const float* right = row(j) - shift;
      if (segments == Segments::kept) {
        bool possible = false;
        for (const Left::Level& level : left.levels) {
          possible |= slots.of(std::max(level.forward, level.backward)) < end;
          const int64_t begin = std::max(low, slots.of(level.need(input)));
          if (begin < high)
            done += relax(best + begin, right + begin, static_cast<float>(again + level.extra), none, high - begin);
        }
        if (!possible) break;
        continue;
      }
      // Why a bound: when the backward of t = j - 1 begins, the blocks before it hold what they keep, and with m bytes
      // in all they keep at least `full - m` less than by their cheapest options. A block keeps less by a dearer
      // option, or nothing by running once more; no byte of that is cheaper than `price`.
      const bool any = segments == Segments::any_bound;
      const int64_t begin = std::max(low, slots.of(any ? left.largest : left.floor.need(input)));
      const double price = any ? left.any_price : left.keep_price;
      if (!any && slots.of(std::max(left.floor.forward, left.floor.backward)) >= end) break;
      if (begin >= high) continue;
      // m slots of the rounded problem may be up to m + 1 in bytes.
      const int64_t middle = std::clamp(left.full / slots.bytes, begin, high);
      if (middle > begin && price < std::numeric_limits<double>::infinity()) {
        const auto lack = static_cast<float>(price * static_cast<double>(left.full - (begin + 1) * slots.bytes));
        const auto step = static_cast<float>(price * static_cast<double>(slots.bytes));
        const auto lacking = [=](int64_t i) { return std::max(lack - step * static_cast<float>(i), 0.0f); };
        done += relax(best + begin, right + begin, c, lacking, middle - begin);
      }
      if (middle < high) done += relax(best + middle, right + middle, c, none, high - middle);
    }
    while (first[s] <= top && !(best[first[s]] < most[first[s]])) first[s]++;
    while (last[s] >= 0 && !(best[last[s]] < most[last[s]])) last[s]--;
    progress.work(done);
  }
}

Plan Spine::plan(int64_t m) const {
  const auto& blocks = chain_.blocks;
  const int length = chain_.size();
  const int64_t gradient = blocks.back().output;
  Plan plan;
  if (row(0)[m] == kInfinity) return plan;
  while (m > 0 && row(0)[m - 1] == row(0)[m]) m--;
  struct Segment {
    int first, split, level;
  };
  std::vector<Segment> found;
  for (int s = 0; s < length;) {
    const float value = row(s)[m];
    const auto option = [&] {
      for (size_t o = 0; o < blocks[s].options.size(); o++) {
        const Option& option = blocks[s].options[o];
        const int64_t shift = s + 1 < length ? slots_.of(option.saved) : 0;
        if (m >= std::max(slots_.of(entry_peak(option, gradient)), shift) &&
            static_cast<float>(option.extra) + row(s + 1)[m - shift] == value) {
          plan.push_back({s, length - 1, kNoSplit, static_cast<int>(o)});
          m -= shift;
          s++;
          return true;
        }
      }
      return false;
    };
    if (option()) continue;
    Left left;
    left.levels.resize(levels_.size());
    int64_t run = 0, input = 0;
    const auto segment = [&] {
      for (int j = s + 1; j < length && blocks[j - 1].recomputable; j++) {
        run = std::max(run, gradient + input + blocks[j - 1].forward_peak);
        input = blocks[j - 1].output;
        left.add(blocks[j - 1], levels_, j - 1);
        const int64_t shift = slots_.of(input);
        if (m < std::max(slots_.of(run), shift)) continue;
        for (size_t g = 0; g < levels_.size(); g++) {
          const auto c = static_cast<float>(chain_.again(s, j) + left.levels[g].extra);
          if (m >= slots_.of(left.levels[g].need(input)) && c + row(j)[m - shift] == value) {
            plan.push_back({s, length - 1, j, 0});
            found.push_back({s, j, static_cast<int>(g)});
            m -= shift;
            s = j;
            return true;
          }
        }
      }
      return false;
    };
    if (!segment()) throw std::logic_error("recompute: the table of flat schedules holds a value that nothing gives");
  }
  for (auto it = found.rbegin(); it != found.rend(); ++it)
    for (int k = it->first; k < it->split; k++) plan.push_back({k, it->split - 1, kNoSplit, levels_[it->level][k]});
  return plan;
}

// ---- all persistent schedules, by slots ----

namespace {

// For each length d and start s the first start of the same kinds, in rows of `kinds.size()`; blocks behind `end` are
// not compared.
std::vector<int> first_alike(const std::vector<int>& kinds, int end) {
  const size_t length = kinds.size();
  std::vector<int> first((length + 1) * length);
  for (size_t d = 0; d <= length; d++) std::iota(&first[d * length], &first[d * length] + length, 0);
  std::unordered_map<uint64_t, int> seen;
  for (int d = 1; d <= end; d++) {
    seen.clear();
    const int* shorter = &first[(d - 1) * length];
    for (int s = 0; s + d <= end; s++) {
      const uint64_t key = d == 1 ? static_cast<uint64_t>(kinds[s])
                                  : static_cast<uint64_t>(shorter[s]) << 32 | static_cast<uint32_t>(shorter[s + 1]);
      first[d * length + s] = seen.emplace(key, s).first->second;
    }
    if (static_cast<int>(seen.size()) == end - d + 1) break;  // no longer ones are alike
  }
  return first;
}

}  // namespace

float Table::Row::at(int64_t m) const {
  if (m < first || values.empty()) return kInfinity;
  return m < end() ? values[m - first] : values.back();
}

const Table::Row* Table::row(int s, int t) const {
  const int found = index_[static_cast<size_t>(s) * chain_.size() + t];
  return found < 0 || rows_[found].values.empty() ? nullptr : &rows_[found];
}

Table::Table(const Chain& chain, Slots slots, int64_t top, double most_extra, int64_t memory_limit, Progress& progress)
    : chain_(chain), slots_(slots), top_(top), most_extra_(most_extra), scratch_(top + 1) {
  const int length = chain.size();
  const auto size = static_cast<size_t>(length);
  std::vector<int> alike;
  const int kinds = 1 + *std::max_element(chain.kinds.begin(), chain.kinds.end());
  if (kinds < length) alike = first_alike(chain.kinds, length - 1);
  index_.assign(size * size, -1);
  auto bytes = static_cast<int64_t>((index_.size() + alike.size()) * sizeof(int));
  for (int t = 0; t < length; t++) {
    for (int s = t; s >= 0; s--) {
      // What ends before the last block is trained only once it has run without history, which costs as much again.
      const double most = t < length - 1 ? most_extra - chain.again(s, t + 1) : most_extra;
      if (most < 0) break;
      int& index = index_[s * size + t];
      if (!alike.empty() && t < length - 1) {
        const int other = alike[(t - s + 1) * size + s];
        if (other < s) {
          index = index_[other * size + (other + t - s)];
          continue;
        }
      }
      index = static_cast<int>(rows_.size());
      rows_.push_back(fill(s, t, most));
      bytes += static_cast<int64_t>(sizeof(Row) + rows_.back().values.size() * sizeof(float));
      if (bytes > memory_limit) throw Limit("memory");
      progress.work(touched_);
      touched_ = 0;
    }
  }
}

Table::Row Table::fill(int s, int t, double most) const {
  const auto& blocks = chain_.blocks;
  const int64_t gradient = blocks[t].output;
  float* best = scratch_.data();
  std::fill(scratch_.begin(), scratch_.end(), kInfinity);
  touched_ += 50 + top_ / 8;
  const auto none = [](int64_t) { return 0.0f; };
  for (const Option& o : blocks[s].options) {
    const auto extra = static_cast<float>(o.extra);
    const int64_t need = slots_.of(entry_peak(o, gradient)), shift = slots_.of(o.saved);
    if (s == t) {
      for (int64_t m = need; m <= top_; m++) best[m] = std::min(best[m], extra);
      continue;
    }
    const Row* right = row(s + 1, t);
    if (!right) continue;
    const int64_t low = std::max(need, shift + right->first);
    const int64_t end = std::clamp(shift + right->end(), low, top_ + 1);
    if (low > top_) continue;
    touched_ += relax(best + low, right->values.data() + (low - shift - right->first), extra, none, end - low);
    for (int64_t m = end; m <= top_; m++) best[m] = std::min(best[m], extra + right->values.back());
  }
  int64_t run = 0, input = 0, end = top_ + 1;
  for (int j = s + 1; j <= t && blocks[j - 1].recomputable; j++) {
    run = std::max(run, gradient + input + blocks[j - 1].forward_peak);
    input = blocks[j - 1].output;
    const auto c = static_cast<float>(chain_.again(s, j));
    while (end > 0 && best[end - 1] <= c) end--;
    touched_ += 10;
    if (c > most || slots_.of(run) >= end) break;
    const Row *right = row(j, t), *left = row(s, j - 1);
    if (!right || !left) continue;
    const int64_t shift = slots_.of(input);
    const int64_t low = std::max({slots_.of(run), shift + right->first, left->first});
    if (low >= end) continue;
    // Behind its end a row stays at its last value.
    const int64_t right_end = std::clamp(shift + right->end(), low, end), left_end = std::clamp(left->end(), low, end);
    const int64_t both = std::min(right_end, left_end);
    const float *r = right->values.data() - (shift + right->first), *l = left->values.data() - left->first;
    const float r_last = right->values.back(), l_last = left->values.back();
    touched_ += relax(best + low, r + low, c, [l, low](int64_t i) { return l[low + i]; }, both - low);
    if (right_end > both)
      touched_ += relax(best + both, r + both, c, [l_last](int64_t) { return l_last; }, right_end - both);
    if (left_end > both) touched_ += relax(best + both, l + both, c + r_last, none, left_end - both);
    const float last = (c + r_last) + l_last;
    for (int64_t m = std::max(right_end, left_end); m < end && last < best[m]; m++) best[m] = last;
  }
  int64_t first = 0, last = top_;
  while (first <= top_ && !(best[first] <= static_cast<float>(most))) first++;
  while (last > first && best[last - 1] == best[last]) last--;
  return {first, first > top_ ? std::vector<float>() : std::vector<float>(best + first, best + last + 1)};
}

double Table::extra(int64_t m) const {
  const Row* root = row(0, chain_.size() - 1);
  return root ? root->at(m) : kInfinity;
}

Plan Table::plan(int64_t m) const {
  struct Todo {
    int first, last;
    int64_t slots;
  };
  const auto& blocks = chain_.blocks;
  Plan plan;
  if (extra(m) == kInfinity) return plan;
  std::vector<Todo> stack{{0, chain_.size() - 1, m}};
  while (!stack.empty()) {
    auto [s, t, m] = stack.back();
    stack.pop_back();
    const Row* here = row(s, t);
    const float value = here->at(m);
    m = std::min(m, here->end() - 1);
    while (m > here->first && here->at(m - 1) == value) m--;
    const auto choose = [&, s = s, t = t, m = m] {
      for (size_t o = 0; o < blocks[s].options.size(); o++) {
        const Option& option = blocks[s].options[o];
        if (m < slots_.of(entry_peak(option, blocks[t].output))) continue;
        const auto extra = static_cast<float>(option.extra);
        const int64_t rest = m - slots_.of(option.saved);
        const Row* right = s < t ? row(s + 1, t) : nullptr;
        if (s == t ? extra == value : right && extra + right->at(rest) == value) {
          plan.push_back({s, t, kNoSplit, static_cast<int>(o)});
          if (s < t) stack.push_back({s + 1, t, rest});
          return true;
        }
      }
      int64_t run = 0, input = 0;
      for (int j = s + 1; j <= t && blocks[j - 1].recomputable; j++) {
        run = std::max(run, blocks[t].output + input + blocks[j - 1].forward_peak);
        if (slots_.of(run) > m) break;
        input = blocks[j - 1].output;
        const int64_t rest = m - slots_.of(input);
        const Row *right = row(j, t), *left = row(s, j - 1);
        if (!right || !left) continue;
        if ((static_cast<float>(chain_.again(s, j)) + right->at(rest)) + left->at(m) == value) {
          plan.push_back({s, t, j, 0});
          stack.push_back({s, j - 1, m});
          stack.push_back({j, t, rest});
          return true;
        }
      }
      return false;
    };
    if (!choose()) throw std::logic_error("recompute: the table of schedules holds a value that nothing gives");
  }
  return plan;
}

// ---- all persistent schedules, exactly ----

Steps::Steps(const Chain& chain, int64_t budget, double most_extra, int64_t memory_limit, Progress& progress)
    : chain_(chain), budget_(budget) {
  const auto& blocks = chain.blocks;
  const int length = chain.size();
  const auto size = static_cast<size_t>(length);
  rows_.resize(size * size);
  int64_t bytes = 0;
  std::vector<Step> found;
  for (int t = 0; t < length; t++) {
    for (int s = t; s >= 0; s--) {
      const double most = t < length - 1 ? most_extra - chain.again(s, t + 1) : most_extra;
      if (most < 0) break;
      found.clear();
      const auto offer = [&](int64_t bytes, double extra, int split, int option) {
        if (bytes <= budget && extra <= most) found.push_back({bytes, extra, split, option});
      };
      for (size_t o = 0; o < blocks[s].options.size(); o++) {
        const Option& option = blocks[s].options[o];
        const int64_t need = entry_peak(option, blocks[t].output);
        if (s == t) offer(need, option.extra, kNoSplit, static_cast<int>(o));
        if (s < t)
          for (const Step& step : rows_[(s + 1) * size + t])
            offer(std::max(need, step.bytes + option.saved), option.extra + step.extra, kNoSplit, static_cast<int>(o));
      }
      int64_t run = 0, input = 0;
      for (int j = s + 1; j <= t && blocks[j - 1].recomputable; j++) {
        run = std::max(run, blocks[t].output + input + blocks[j - 1].forward_peak);
        input = blocks[j - 1].output;
        const double again = chain.again(s, j);
        if (run > budget || again > most) break;
        const auto &right = rows_[j * size + t], &left = rows_[s * size + j - 1];
        if (right.empty() || left.empty()) continue;
        size_t r = 0, l = 0;
        while (true) {
          const int64_t right_bytes = right[r].bytes + input, left_bytes = left[l].bytes;
          offer(std::max({run, right_bytes, left_bytes}), again + right[r].extra + left[l].extra, j, 0);
          // The next step of either function, whichever comes first.
          const bool more_right = r + 1 < right.size(), more_left = l + 1 < left.size();
          if (!more_right && !more_left) break;
          const int64_t next_right = more_right ? right[r + 1].bytes + input : std::numeric_limits<int64_t>::max();
          const int64_t next_left = more_left ? left[l + 1].bytes : std::numeric_limits<int64_t>::max();
          r += next_right <= next_left;
          l += next_left <= next_right;
        }
      }
      std::sort(found.begin(), found.end(),
                [](const Step& a, const Step& b) { return std::pair(a.bytes, a.extra) < std::pair(b.bytes, b.extra); });
      auto& row = rows_[s * size + t];
      for (const Step& step : found)
        if (row.empty() || step.extra < row.back().extra) row.push_back(step);
      row.shrink_to_fit();
      bytes += static_cast<int64_t>(row.size() * sizeof(Step));
      if (bytes > memory_limit) throw Limit("memory");
      progress.work(100 + 40 * static_cast<int64_t>(found.size()));
    }
  }
}

Plan Steps::plan() const {
  struct Todo {
    int first, last;
    int64_t bytes;
  };
  const auto size = static_cast<size_t>(chain_.size());
  Plan plan;
  if (rows_[size - 1].empty()) return plan;
  std::vector<Todo> stack{{0, chain_.size() - 1, budget_}};
  while (!stack.empty()) {
    const auto [s, t, bytes] = stack.back();
    stack.pop_back();
    const auto& row = rows_[s * size + t];
    const Step& step = *std::prev(std::upper_bound(row.begin(), row.end(), bytes,
                                                   [](int64_t bytes, const Step& step) { return bytes < step.bytes; }));
    plan.push_back({s, t, step.split, step.option});
    if (step.split != kNoSplit) {
      stack.push_back({s, step.split - 1, step.bytes});
      stack.push_back({step.split, t, step.bytes - chain_.blocks[step.split - 1].output});
    } else if (s < t) {
      stack.push_back({s + 1, t, step.bytes - chain_.blocks[s].options[step.option].saved});
    }
  }
  return plan;
}

}  // namespace pyperf::recompute
