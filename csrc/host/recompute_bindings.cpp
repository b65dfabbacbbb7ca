// pyperf_dl._host.recompute: schedules of activation recompute.
#include "recompute_bindings.h"

#include <pybind11/stl.h>

#include "recompute.h"

namespace py = pybind11;

namespace pyperf::recompute {

namespace {

// Called from a search, which holds no interpreter lock.
void raise_pending_signal() {
  py::gil_scoped_acquire locked;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// From `ChainProfile.blocks`.
Chain chain_of(const py::sequence& blocks, double frame_seconds, std::vector<int> kinds) {
  std::vector<Block> found;
  for (const py::handle item : blocks) {
    const auto b = py::reinterpret_borrow<py::tuple>(item);
    Block block{b[1].cast<double>(), b[2].cast<int64_t>(), b[3].cast<int64_t>(), b[5].cast<bool>(), {}, 0};
    for (const py::handle each : py::reinterpret_borrow<py::tuple>(b[4])) {
      const auto o = py::reinterpret_borrow<py::tuple>(each);
      block.options.push_back({o[1].cast<double>(), o[2].cast<double>(), o[3].cast<int64_t>(), o[4].cast<int64_t>(),
                               o[5].cast<int64_t>(), 0});
    }
    found.push_back(std::move(block));
  }
  return Chain(std::move(found), frame_seconds, std::move(kinds));
}

py::list to_python(const Plan& plan) {
  py::list nodes;
  for (const Node& node : plan) {
    const py::object split = node.split == kNoSplit ? py::object(py::none()) : py::int_(node.split);
    nodes.append(py::make_tuple(node.first, node.last, split, node.option));
  }
  return nodes;
}

Plan from_python(const py::sequence& nodes) {
  Plan plan;
  for (const py::handle item : nodes) {
    const auto n = py::reinterpret_borrow<py::tuple>(item);
    plan.push_back(
        {n[0].cast<int>(), n[1].cast<int>(), n[2].is_none() ? kNoSplit : n[2].cast<int>(), n[3].cast<int>()});
  }
  return plan;
}

py::list events_of(const Chain& chain, const py::sequence& nodes) {
  const char* names[] = {"forward", "replay", "history", "backward"};
  py::list events;
  simulate(chain, from_python(nodes), [&](const Event& e) {
    events.append(py::make_tuple(names[static_cast<int>(e.what)], e.block, e.start, e.seconds, e.peak, e.after));
  });
  return events;
}

py::tuple cost_of(const Chain& chain, const py::sequence& nodes) {
  const Cost found = cost(chain, from_python(nodes));
  return py::make_tuple(found.peak, found.seconds);
}

template <class Search>
py::list searched(Search search) {
  Plan plan;
  {
    py::gil_scoped_release unlocked;
    plan = search();
  }
  return to_python(plan);
}

}  // namespace

void bind(py::module_ m) {
  py::register_exception<Limit>(m, "Limit");
  py::enum_<Rounding>(m, "Rounding")
      .value("down", Rounding::down)
      .value("nearest", Rounding::nearest)
      .value("up", Rounding::up);
  py::class_<Chain>(m, "Chain")
      .def(py::init(&chain_of), py::arg("blocks"), py::arg("frame_seconds"), py::arg("kinds"))
      .def_readonly("seconds", &Chain::seconds, "Of all blocks by their cheapest options, without recomputation.");
  py::class_<Progress>(m, "Progress", "Ends a search by `Limit`, or by the exception of a pending signal.")
      .def(py::init([](double seconds, double work) { return Progress(seconds, work, raise_pending_signal); }),
           py::arg("seconds"), py::arg("work"));
  m.def("simulate", &events_of, "Every event: what, block, start, seconds, peak, after.");
  m.def("cost", &cost_of, "Peak and seconds of nodes.");
  m.def(
      "least_memory", [](const Chain& c, Progress& p) { return searched([&] { return least_memory(c, p); }); },
      "Nodes of a schedule with the least peak.");
  m.def(
      "flat",
      [](const Chain& c, int64_t budget, int64_t slot, int64_t top, Rounding rounding, Progress& p) {
        return searched([&] { return fitting(c, Spine(c, {slot, rounding}, top, Spine::Segments::kept, p), budget); });
      },
      "Nodes of a schedule that runs each block at most twice; empty where none was found.");
  m.def(
      "flat_bound",
      [](const Chain& c, int64_t slot, int64_t top, bool any, double most, Progress& p) {
        py::gil_scoped_release unlocked;
        const auto segments = any ? Spine::Segments::any_bound : Spine::Segments::kept_bound;
        return Spine(c, {slot, Rounding::down}, top, segments, p, most).extra(top);
      },
      "Extra time below which no flat, or no persistent schedule is.");
  m.def(
      "table",
      [](const Chain& c, int64_t budget, int64_t slot, int64_t top, Rounding rounding, double most, int64_t memory,
         Progress& p) {
        return searched([&] { return fitting(c, Table(c, {slot, rounding}, top, most, memory, p), budget); });
      },
      "Nodes of the best persistent schedule by slots; empty where none was found with at most that extra time.");
  m.def(
      "table_bound",
      [](const Chain& c, int64_t slot, int64_t top, double most, int64_t memory, Progress& p) {
        py::gil_scoped_release unlocked;
        return Table(c, {slot, Rounding::down}, top, most, memory, p).extra(top);
      },
      "Extra time below which no persistent schedule is.");
  m.def(
      "steps",
      [](const Chain& c, int64_t budget, double most, int64_t memory, Progress& p) {
        return searched([&] { return Steps(c, budget, most, memory, p).plan(); });
      },
      "Nodes of the best persistent schedule; empty where there is none with at most that extra time.");
}

}  // namespace pyperf::recompute
