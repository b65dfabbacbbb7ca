// nvcc -std=c++17 -O1 -lineinfo sliding_window_cuda.cu: the same checks on a GPU, also under compute-sanitizer.
#include "sliding_window_cuda.h"

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 300;
  test::check_small(rounds);
  test::check_long(rounds);
  test::check_huge(rounds / 4);
  return test::summary();
}
