#pragma once

#include <pybind11/pybind11.h>

namespace pyperf::recompute {

void bind(pybind11::module_ m);

}  // namespace pyperf::recompute
