// Torch-free test of kernels/math/elementary.h at every SIMD level of this processor: errors in ulps against long
// double, special values, and the same bits on all levels as from the scalar form that a GPU runs.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../kernels/common/platform.h"

#define PYPERF_SIMD_BODY "../../tests/native/elementary_body.h"
#include "../../kernels/cpu/simd_levels.h"

namespace {

using namespace pyperf;

int passed = 0, failed = 0;
void report(bool ok, const char* what, double x, double got, double want) {
  ok ? ++passed : ++failed;
  if (!ok && failed <= 20) printf("FAILED %s(%.17g) = %.17g where %.17g is right\n", what, x, got, want);
}

enum Function { kExp, kLog, kLog1p, kSoftplus, kCount };
constexpr const char* kNames[] = {"exp", "log", "log1p", "softplus"};

long double truth(int function, long double x) {
  if (function == kExp) return std::exp(x);
  if (function == kLog) return std::log(x);
  if (function == kLog1p) return std::log1p(x);
  return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}

template <class R>
double ulps(R got, long double want) {
  if (std::isnan(want) || std::isnan(got)) return std::isnan(want) == std::isnan(got) ? 0 : INFINITY;
  const R near = R(want);
  if (got == near) return 0;
  if (std::isinf(got) || std::isinf(near)) return INFINITY;
  const R up = std::nextafter(std::fabs(near), R(INFINITY)) - std::fabs(near);
  return double(std::fabs((long double)got - want) / up);
}

template <class R>
using Evaluate = void (*)(int, const R*, R*, int64_t);

template <class R>
void test(const std::vector<std::pair<const char*, Evaluate<R>>>& levels, int rounds, const double (&bounds)[kCount]) {
  std::mt19937_64 generator(1);
  const auto uniform = [&](double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(generator);
  };
  for (int function = 0; function < kCount; ++function) {
    std::vector<R> x{R(0),
                     R(-0.0),
                     R(1),
                     R(INFINITY),
                     R(NAN),
                     std::numeric_limits<R>::denorm_min(),
                     std::numeric_limits<R>::min(),
                     std::numeric_limits<R>::max(),
                     R(0.5),
                     R(2)};
    if (function == kExp || function == kSoftplus)
      for (double v : {-1.0, -87.0, -88.0, -103.0, -104.0, 88.0, 88.8, 89.0, -745.0, -746.0, 709.0, 710.0, -1e4, 1e4,
                       double(-INFINITY)})
        x.push_back(R(v));
    const double widest = sizeof(R) == 4 ? 105 : 750;
    for (int i = 0; i < rounds * 500; ++i) {
      if (function == kExp || function == kSoftplus) x.push_back(R(i % 2 ? uniform(-widest, widest) : uniform(-2, 2)));
      if (function == kLog) x.push_back(R(i % 2 ? std::exp(uniform(-widest, widest)) : uniform(0.5, 2)));
      if (function == kLog1p) x.push_back(R(i % 2 ? std::exp(uniform(-widest, 0)) : uniform(0, 1)));
    }
    if (function == kLog1p)
      for (R& v : x) v = std::isnan(v) || v > 1 ? R(1) : v;
    while (x.size() % 16) x.push_back(R(1));
    std::vector<R> first;
    for (const auto& [name, evaluate] : levels) {
      std::vector<R> y(x.size());
      evaluate(function, x.data(), y.data(), int64_t(x.size()));
      double worst = 0;
      for (size_t i = 0; i < x.size(); ++i) {
        const double error = ulps(y[i], truth(function, x[i]));
        worst = std::max(worst, error);
        report(error <= bounds[function], kNames[function], x[i], y[i], double(truth(function, x[i])));
        if (!first.empty())
          report(std::memcmp(&first[i], &y[i], sizeof(R)) == 0 || (y[i] != y[i] && first[i] != first[i]), "level", x[i],
                 y[i], first[i]);
      }
      if (first.empty()) first = y;
      printf("%-10s %-8s %zu bits: %.3f ulp\n", name, kNames[function], 8 * sizeof(R), worst);
    }
  }
}

template <class R>
void scalars(int function, const R* x, R* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = baseline::elementary_of<baseline::ScalarMachine<R>>(function, x[i]);
}

template <class R>
std::vector<std::pair<const char*, Evaluate<R>>> levels() {
  std::vector<std::pair<const char*, Evaluate<R>>> found{{"scalar", &scalars<R>},
                                                         {"baseline", &baseline::elementary_vectors<R>}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v3")) found.push_back({"x86-64-v3", &x86_64_v3::elementary_vectors<R>});
  if (__builtin_cpu_supports("x86-64-v4")) found.push_back({"x86-64-v4", &x86_64_v4::elementary_vectors<R>});
#endif
  return found;
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 100;
  test<float>(levels<float>(), rounds, {1.0, 1.0, 2.0, 3.0});
  test<double>(levels<double>(), rounds, {1.0, 1.0, 2.0, 3.0});
  printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}
