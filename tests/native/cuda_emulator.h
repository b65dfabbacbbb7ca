// Runs kernels/cuda on a CPU: every CUDA thread is a fiber, a barrier is a switch to the next one. Include it before
// the kernels and compile with g++. Blocks run one after the other; the order of the threads between two barriers is
// `emulator::order`, so that a missing barrier shows as a wrong result in one of the orders.
#pragma once

#if defined(__CUDACC__)
#error "cuda_emulator.h replaces the CUDA compiler"
#endif

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define PYPERF_CUDA_EMULATOR 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Threads run one at a time.
inline unsigned long long atomicAdd(unsigned long long* place, unsigned long long v) {
  const unsigned long long before = *place;
  *place += v;
  return before;
}

inline cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  *pointer = malloc(bytes ? bytes : 1);
  return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFree(void* pointer) {
  free(pointer);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes) memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "success" : "error"; }

#if defined(__x86_64__)
extern "C" void pyperf_fiber_switch(void** from, void* to);
asm(R"(
.text
.type pyperf_fiber_switch, @function
pyperf_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pyperf_fiber_switch, .-pyperf_fiber_switch
)");
#endif

namespace emulator {

enum class Order { ascending, descending, shuffled };

inline Order order = Order::ascending;
inline int64_t max_grid = int64_t(1) << 31;  // a small value makes kernels walk their grid-stride loops
inline int64_t launches = 0;

enum class State { ready, at_block_barrier, at_warp_barrier, done };

constexpr size_t kStackBytes = size_t(128) << 10;

struct Fiber {
  State state = State::done;
  dim3 thread;
  uint32_t warp_mask = 0;
  uint64_t exchanged = 0;
  std::unique_ptr<unsigned char[]> stack;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

struct Machine {
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  Fiber scheduler;
  std::function<void()> body;
  dim3 block_index, block_size, grid_size;
  std::vector<uint4> shared;  // no slack: AddressSanitizer sees an access behind the requested bytes
  uint64_t random = 88172645463325252ull;
};
inline Machine machine;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "cuda_emulator: %s (block %u, thread %u)\n", what, machine.block_index.x,
          machine.current ? machine.current->thread.x : 0);
  abort();
}

inline void switch_fiber(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  static const void* scheduler_bottom = nullptr;
  static size_t scheduler_size = 0;
  void* fake_stack = nullptr;
  const bool to_scheduler = &to == &machine.scheduler;
  __sanitizer_start_switch_fiber(from.state == State::done && &from != &machine.scheduler ? nullptr : &fake_stack,
                                 to_scheduler ? scheduler_bottom : to.stack.get(),
                                 to_scheduler ? scheduler_size : kStackBytes);
#endif
#if defined(__x86_64__)
  pyperf_fiber_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(fake_stack, &bottom, &size);
  if (&from != &machine.scheduler) scheduler_bottom = bottom, scheduler_size = size;
#endif
}

inline void yield_as(State state) {
  Fiber& self = *machine.current;
  self.state = state;
  switch_fiber(self, machine.scheduler);
}

#if defined(__SANITIZE_ADDRESS__)
__attribute__((no_sanitize_address))
#endif
inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  machine.body();
  yield_as(State::done);
  fail("a finished thread was resumed");
}

inline void start_fiber(Fiber& fiber, unsigned thread) {
  if (!fiber.stack) fiber.stack.reset(new unsigned char[kStackBytes]);
  fiber.thread = {thread, 0, 0};
  fiber.state = State::ready;
#if defined(__x86_64__)
  auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackBytes) & ~uintptr_t(63);
  auto slots = reinterpret_cast<void**>(top) - 8;
  for (int i = 0; i < 6; ++i) slots[i] = nullptr;
  slots[6] = reinterpret_cast<void*>(&fiber_main);
  slots[7] = nullptr;
  fiber.stack_pointer = slots;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &fiber_main, 0);
#endif
}

inline unsigned next_in_order(unsigned step, unsigned threads, unsigned salt) {
  if (order == Order::ascending) return step;
  if (order == Order::descending) return threads - 1 - step;
  return unsigned((step * 2654435761ull + salt) % threads);  // a permutation: the factor is an odd prime
}

inline void release_block_barrier(unsigned threads) {
  bool waiting = false;
  for (unsigned t = 0; t < threads; ++t) {
    const State s = machine.fibers[t].state;
    if (s == State::ready || s == State::at_warp_barrier) fail("deadlock: threads wait at different barriers");
    waiting |= s == State::at_block_barrier;
  }
  if (!waiting) return;
  for (unsigned t = 0; t < threads; ++t)
    if (machine.fibers[t].state == State::at_block_barrier) machine.fibers[t].state = State::ready;
}

inline void run_block(unsigned threads) {
  for (unsigned t = 0; t < threads; ++t) start_fiber(machine.fibers[t], t);
  for (bool alive = true; alive;) {
    bool progressed = false;
    machine.random = machine.random * 6364136223846793005ull + 1442695040888963407ull;
    const unsigned salt = unsigned(machine.random >> 33);
    for (unsigned step = 0; step < threads; ++step) {
      Fiber& fiber = machine.fibers[next_in_order(step, threads, salt)];
      if (fiber.state != State::ready) continue;
      progressed = true;
      machine.current = &fiber;
      switch_fiber(machine.scheduler, fiber);
    }
    if (!progressed) release_block_barrier(threads);
    alive = false;
    for (unsigned t = 0; t < threads; ++t) alive |= machine.fibers[t].state != State::done;
  }
  machine.current = nullptr;
}

inline unsigned lane() { return machine.current->thread.x & 31; }

inline Fiber& lane_fiber(unsigned lane) { return machine.fibers[(machine.current->thread.x & ~31u) + lane]; }

inline void warp_barrier(uint32_t mask) {
  machine.current->warp_mask = mask;
  for (unsigned l = 0; l < 32; ++l) {
    if (!(mask >> l & 1) || l == lane()) continue;
    const Fiber& other = lane_fiber(l);
    if (other.state != State::at_warp_barrier || other.warp_mask != mask) return yield_as(State::at_warp_barrier);
  }
  for (unsigned l = 0; l < 32; ++l)
    if ((mask >> l & 1) && l != lane()) lane_fiber(l).state = State::ready;
  yield_as(State::ready);
}

template <class T>
T exchange(uint32_t mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8);
  if (!(mask >> lane() & 1)) fail("a lane outside its mask takes part in a shuffle");
  machine.current->exchanged = 0;
  memcpy(&machine.current->exchanged, &value, sizeof value);
  warp_barrier(mask);
  memcpy(&value, &lane_fiber(source).exchanged, sizeof value);
  warp_barrier(mask);
  return value;
}

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), int64_t grid, int block, size_t shared_bytes, A... arguments) {
  if (grid < 1 || grid > INT32_MAX || block < 1 || block > 1024) return cudaErrorInvalidValue;
  ++launches;
  if (machine.fibers.size() < size_t(block)) machine.fibers.resize(block);
  machine.grid_size.x = unsigned(grid);
  machine.block_size.x = unsigned(block);
  machine.body = [&] { kernel(P(arguments)...); };
  for (int64_t b = 0; b < grid; ++b) {
    machine.block_index.x = unsigned(b);
    std::vector<uint4>((shared_bytes + 15) / 16, uint4{0xabababab, 0xabababab, 0xabababab, 0xabababab})
        .swap(machine.shared);
    run_block(unsigned(block));
  }
  return cudaSuccess;
}

}  // namespace emulator

#define threadIdx (emulator::machine.current->thread)
#define blockIdx (emulator::machine.block_index)
#define blockDim (emulator::machine.block_size)
#define gridDim (emulator::machine.grid_size)

inline uint32_t __vmaxs2(uint32_t a, uint32_t b) {
  const uint32_t high = int32_t(a & 0xffff0000u) > int32_t(b & 0xffff0000u) ? a : b;
  const uint32_t low = int16_t(a) > int16_t(b) ? a : b;
  return (high & 0xffff0000u) | (low & 0xffffu);
}
inline void __sincosf(float angle, float* sine, float* cosine) { *sine = sinf(angle), *cosine = cosf(angle); }
inline void __syncthreads() { emulator::yield_as(emulator::State::at_block_barrier); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { emulator::warp_barrier(mask); }

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
  const unsigned segment = emulator::lane() & ~unsigned(width - 1);
  return emulator::exchange(mask, value, segment + (unsigned(source) & unsigned(width - 1)));
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  const unsigned in_segment = emulator::lane() & unsigned(width - 1);
  return emulator::exchange(mask, value, in_segment >= delta ? emulator::lane() - delta : emulator::lane());
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  const unsigned in_segment = emulator::lane() & unsigned(width - 1);
  return emulator::exchange(mask, value,
                            in_segment + delta < unsigned(width) ? emulator::lane() + delta : emulator::lane());
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int = 32) {
  return emulator::exchange(mask, value, emulator::lane() ^ unsigned(lane_mask));
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate) {
  uint32_t votes = 0;
  emulator::machine.current->exchanged = predicate;
  emulator::warp_barrier(mask);
  for (unsigned l = 0; l < 32; ++l)
    if (mask >> l & 1) votes |= uint32_t(emulator::lane_fiber(l).exchanged) << l;
  emulator::warp_barrier(mask);
  return votes;
}
