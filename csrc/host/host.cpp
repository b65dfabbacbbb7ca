// Host-side helpers that need neither torch nor a device.
#include <pybind11/pybind11.h>

#include "recompute_bindings.h"

namespace py = pybind11;

namespace {

py::dict build_facts() {
  py::dict facts;
  facts["version"] = PYPERF_VERSION;
  facts["torch"] = PYPERF_BUILD_TORCH;
  facts["nvcc"] = PYPERF_BUILD_NVCC;
  facts["cuda_archs"] = PYPERF_BUILD_CUDA_ARCHS;
  facts["compiler"] = __VERSION__;
  return facts;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side helpers of pyperf_dl that need neither torch nor a device.";
  m.def("build_facts", &build_facts, "What this installation was built with: versions and CUDA architectures.");
  pyperf::recompute::bind(m.def_submodule("recompute", "Schedules of activation recompute."));
}
