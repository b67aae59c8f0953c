// Runs CUDA kernels on the CPU, so that tests need no GPU: g++ compiles the very sources with this
// header in place of <cuda_runtime.h>.
//
// Blocks run one after another. Every thread of a block is a fiber that runs until it must wait: at
// __syncthreads, or at a warp operation (shuffle, ballot, __syncwarp) for the other lanes of its mask.
// Scheduling is warp-greedy: a warp goes on until all its lanes wait for the block, so that warps are
// as far apart as barriers let them be; the order of blocks, warps and lanes is a `Schedule`. Shared
// memory holds garbage when a block starts. A missing barrier therefore shows as a wrong result.
// What a GPU leaves undefined throws std::runtime_error from the launch: a barrier that some threads
// do not reach, or reach elsewhere in the source; lanes that disagree on a mask or are not in it.
//
// Two fibers never run at once: missing atomics and fences cannot be found in this way.
// Under AddressSanitizer dynamic shared memory has exact bounds; static shared memory has them with
// -fsanitize-sections=cuda_shared.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Functions with shared memory need internal linkage: g++ keeps no inline ones in a named section.
#define __shared__ static __attribute__((section("cuda_shared")))

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned count() const { return x * y * z; }
  uint3 at(unsigned i) const { return {i % x, i / x % y, i / (x * y)}; }
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }  // a failed launch throws

extern "C" char __start_cuda_shared[] __attribute__((weak));  // bounds of the section, by the linker
extern "C" char __stop_cuda_shared[] __attribute__((weak));

namespace cuda_emulation {

enum class Schedule { forward, reverse, random };
inline Schedule schedule = Schedule::forward;
inline std::mt19937 generator;  // of random orders and garbage; seed it for another order

constexpr unsigned warp_size = 32;
constexpr size_t stack_bytes = 128 << 10;

// Where a thread waits.
struct Place {
  std::string_view operation;
  int line = 0;
  bool operator==(const Place&) const = default;
  std::string text() const { return std::string(operation) + " (line " + std::to_string(line) + ")"; }
};

struct Thread {
  enum State { ready, at_barrier, at_warp_operation, finished } state = ready;
  ucontext_t context;
  char* stack = nullptr;
  unsigned number = 0;
  Place place;
  unsigned mask = 0;  // of that warp operation
  uint64_t sent = 0;
  std::array<uint64_t, warp_size> received{};  // what the lanes of the mask sent
};

// The launch that is running.
struct Launch {
  std::vector<Thread> threads;
  std::unique_ptr<char[]> stacks, dynamic_shared;
  Thread* current = nullptr;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::string error;
  void (*run)(void*) = nullptr;  // the kernel with its arguments
  void* arguments = nullptr;
};
inline Launch* active = nullptr;

inline std::vector<unsigned> order(unsigned count) {
  std::vector<unsigned> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  if (schedule == Schedule::reverse) std::reverse(numbers.begin(), numbers.end());
  if (schedule == Schedule::random) std::shuffle(numbers.begin(), numbers.end(), generator);
  return numbers;
}

// Not through memset, which AddressSanitizer would stop at the red zones between shared variables.
__attribute__((no_sanitize_address)) inline void fill_with_garbage(char* begin, char* end) {
  for (volatile char* byte = begin; byte != end; ++byte) *byte = static_cast<char>(generator());
}

// From the current fiber to the scheduler.
inline void suspend(Thread::State state) {
  Thread& self = *active->current;
  self.state = state;
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(state == Thread::finished ? nullptr : &fake_stack, active->scheduler_stack,
                                 active->scheduler_stack_bytes);
  swapcontext(&self.context, &active->scheduler);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

[[noreturn]] inline void fail(const std::string& message) {
  active->error = "thread " + std::to_string(active->current->number) + ": " + message;
  for (;;) suspend(Thread::finished);
}

inline void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &active->scheduler_stack, &active->scheduler_stack_bytes);
  active->run(active->arguments);
  active->current->place = {"the end of the kernel"};
  suspend(Thread::finished);
}

inline void resume(Thread& thread) {
  active->current = &thread;
  threadIdx = blockDim.at(thread.number);
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, thread.stack, stack_bytes);
  swapcontext(&active->scheduler, &thread.context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  if (!active->error.empty()) throw std::runtime_error("CUDA emulation: " + active->error);
}

// Runs the lanes of a warp until all wait for the block, or for each other.
inline void run_warp(unsigned warp) {
  const unsigned first = warp * warp_size;
  const unsigned lanes = std::min<unsigned>(warp_size, active->threads.size() - first);
  for (bool progress = true; progress;) {
    progress = false;
    for (unsigned lane : order(lanes)) {
      Thread& thread = active->threads[first + lane];
      if (thread.state != Thread::ready) continue;
      resume(thread);
      progress = true;
    }
  }
}

[[noreturn]] inline void throw_deadlock() {
  std::map<std::string, unsigned> places;
  for (const Thread& thread : active->threads) ++places[thread.place.text()];
  std::string message = "CUDA emulation: deadlock";
  for (const auto& [place, count] : places) message += ", " + std::to_string(count) + " threads at " + place;
  throw std::runtime_error(message);
}

inline void run_block() {
  for (Thread& thread : active->threads) {
    thread.state = Thread::ready;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack;
    thread.context.uc_stack.ss_size = stack_bytes;
    makecontext(&thread.context, fiber_main, 0);
    // Else AddressSanitizer's swapcontext forgets the red zones of this stack at every switch.
    thread.context.uc_stack.ss_size = 0;
  }
  const unsigned warps = (active->threads.size() + warp_size - 1) / warp_size;
  for (;;) {
    for (unsigned warp : order(warps)) run_warp(warp);
    const Thread& one = active->threads[0];
    if (!std::ranges::all_of(active->threads, [&](const Thread& thread) {
          return thread.state == one.state && thread.state != Thread::at_warp_operation &&
                 thread.place == one.place;
        })) {
      throw_deadlock();
    }
    if (one.state == Thread::finished) return;
    for (Thread& thread : active->threads) thread.state = Thread::ready;
  }
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Arguments... arguments) {
  const unsigned count = block.count();
  if (grid.count() == 0 || count == 0 || count > 1024) {
    throw std::runtime_error("CUDA emulation: invalid launch of " + std::to_string(grid.count()) +
                             " blocks of " + std::to_string(count) + " threads");
  }
  using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  Call call(kernel, std::tuple<Parameters...>(arguments...));
  Launch state;
  state.threads.resize(count);
  state.stacks.reset(new char[count * stack_bytes]);
  state.arguments = &call;
  state.run = [](void* c) { std::apply(static_cast<Call*>(c)->first, static_cast<Call*>(c)->second); };
  for (unsigned i = 0; i < count; ++i) {
    state.threads[i].number = i;
    state.threads[i].stack = state.stacks.get() + i * stack_bytes;
  }
  active = &state;
  gridDim = grid;
  blockDim = block;
  for (unsigned number : order(grid.count())) {
    blockIdx = grid.at(number);
    state.dynamic_shared.reset(new char[shared_bytes]);
    fill_with_garbage(state.dynamic_shared.get(), state.dynamic_shared.get() + shared_bytes);
    fill_with_garbage(__start_cuda_shared, __stop_cuda_shared);
    run_block();
  }
}

// What `extern __shared__ T name[];` is in CUDA.
template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(active->dynamic_shared.get());
}

// Sends `value` to the lanes of `mask` and waits until all of them have called the same operation.
inline const Thread& exchange(unsigned mask, uint64_t value, const char* operation, int line) {
  Thread& self = *active->current;
  const unsigned lane = self.number % warp_size;
  Thread* warp = &self - lane;
  const unsigned lanes = std::min<unsigned>(warp_size, active->threads.size() - (self.number - lane));
  self.place = {operation, line};
  self.mask = mask;
  self.sent = value;
  if (!(mask >> lane & 1)) fail(self.place.text() + ": the lane mask does not name the calling lane");
  if (lanes < warp_size && mask >> lanes)
    fail(self.place.text() + ": the lane mask names lanes that do not exist");
  bool complete = true;
  for (unsigned i = 0; i < lanes; ++i) {
    if (i == lane || !(mask >> i & 1)) continue;
    const Thread& other = warp[i];
    if (other.state == Thread::finished)
      fail(self.place.text() + ": the lane mask names a lane that has returned");
    if (other.state != Thread::at_warp_operation || !(other.mask >> lane & 1)) {
      complete = false;  // it is still on the way
    } else if (other.mask != mask || other.place != self.place) {
      fail(self.place.text() + ": a lane waits for it with another mask or at " + other.place.text());
    }
  }
  if (!complete) {
    suspend(Thread::at_warp_operation);
    return self;
  }
  std::array<uint64_t, warp_size> values{};
  for (unsigned i = 0; i < lanes; ++i) values[i] = warp[i].sent;
  for (unsigned i = 0; i < lanes; ++i) {
    if (!(mask >> i & 1)) continue;
    warp[i].received = values;
    warp[i].state = Thread::ready;
  }
  return self;
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, const char* operation, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const Thread& self = exchange(mask, bits, operation, line);
  if (source >= warp_size) return value;
  if (!(mask >> source & 1)) fail(self.place.text() + ": reads a lane that is not in the mask");
  std::memcpy(&value, &self.received[source], sizeof(T));
  return value;
}

inline unsigned lane() { return active->current->number % warp_size; }

}  // namespace cuda_emulation

// The default arguments give the line of the call. Source lanes out of the warp return the own value.
inline void __syncthreads(int line = __builtin_LINE()) {
  cuda_emulation::active->current->place = {"__syncthreads", line};
  cuda_emulation::suspend(cuda_emulation::Thread::at_barrier);
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFF, int line = __builtin_LINE()) {
  cuda_emulation::exchange(mask, 0, "__syncwarp", line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  const auto& received = cuda_emulation::exchange(mask, predicate != 0, "__ballot_sync", line).received;
  unsigned votes = 0;
  for (unsigned i = 0; i < cuda_emulation::warp_size; ++i) votes |= (mask >> i & 1 & received[i]) << i;
  return votes;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  return cuda_emulation::shuffle(mask, value, source % cuda_emulation::warp_size, "__shfl_sync", line);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int line = __builtin_LINE()) {
  return cuda_emulation::shuffle(mask, value, cuda_emulation::lane() - delta, "__shfl_up_sync", line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int line = __builtin_LINE()) {
  return cuda_emulation::shuffle(mask, value, cuda_emulation::lane() + delta, "__shfl_down_sync", line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int line = __builtin_LINE()) {
  return cuda_emulation::shuffle(mask, value, cuda_emulation::lane() ^ bits, "__shfl_xor_sync", line);
}
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
