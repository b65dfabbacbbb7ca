// g++ -std=c++20 -O2 -fno-strict-aliasing [-fsanitize=address,undefined] coupling_cuda.cpp: the CUDA kernels on a CPU,
// with the threads of a block in three orders.
#include "coupling_cuda.h"

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 120;
  using emulator::Order;
  for (const Order order : {Order::ascending, Order::descending, Order::shuffled}) {
    emulator::order = order;
    emulator::max_grid = order == Order::ascending ? int64_t(1) << 31 : 3;
    test::check_random(5 * rounds);
    test::check_large_samples(rounds / 8);
  }
  test::check_many_samples();
  return test::summary();
}
