// Elementary functions and the machine of one CUDA thread.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/platform.h"

namespace pyperf {
#include "../math/elementary.h"
}  // namespace pyperf
