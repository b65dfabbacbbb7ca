// Stamps PYPERF_SIMD_BODY once for each instruction set, in a namespace of its own, so that one binary serves every
// processor and no inline function compiled for a newer one can be linked into the others.
//
//   #define PYPERF_SIMD_BODY "<family>.h"
//   #include "../kernels/cpu/simd_levels.h"
//
// A body finds PYPERF_VECTOR_BYTES, the widest vector of its level. No include guard: one inclusion a family.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pyperf::baseline {
#define PYPERF_VECTOR_BYTES 16
#include PYPERF_SIMD_BODY
#undef PYPERF_VECTOR_BYTES
}  // namespace pyperf::baseline

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v3"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#endif
namespace pyperf::x86_64_v3 {
#define PYPERF_VECTOR_BYTES 32
#include PYPERF_SIMD_BODY
#undef PYPERF_VECTOR_BYTES
}  // namespace pyperf::x86_64_v3
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#endif
namespace pyperf::x86_64_v4 {
#define PYPERF_VECTOR_BYTES 64
#include PYPERF_SIMD_BODY
#undef PYPERF_VECTOR_BYTES
}  // namespace pyperf::x86_64_v4
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
