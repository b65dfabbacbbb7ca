// nvcc -std=c++17 -O1 -lineinfo --fmad=false coupling_cuda.cu: the same checks on a GPU, also under compute-sanitizer.
#include "coupling_cuda.h"

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 300;
  test::check_random(5 * rounds);
  test::check_large_samples(rounds / 8);
  if (rounds >= 100) test::check_many_samples();
  return test::summary();
}
