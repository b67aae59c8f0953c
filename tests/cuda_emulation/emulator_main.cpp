// Kernels whose result, or whose error, CUDA defines: what the emulator itself is tested with.
//
// emulator_main CASE prints the result of the kernel of that name, or the error on stderr.
#include <cstdio>
#include <map>
#include <string>

#include "launch.cuh"

constexpr unsigned ALL = 0xFFFFFFFF;

static __global__ void reversed_by_shared_memory(int* out) {
  __shared__ int values[96];
  values[threadIdx.x] = blockIdx.x * 96 + threadIdx.x;
  __syncthreads();
  out[blockIdx.x * 96 + threadIdx.x] = values[95 - threadIdx.x];
}

static __global__ void stale_shared_memory(int* out) {
  __shared__ int values[96];
  int* dynamic = cuda_emulation::dynamic_shared<int>();
  out[blockIdx.x * 96 + threadIdx.x] = values[threadIdx.x] == 7 || dynamic[threadIdx.x] == 7;
  values[threadIdx.x] = dynamic[threadIdx.x] = 7;
}

static __global__ void shuffles(int* out) {
  const int lane = threadIdx.x % 32;
  int value = threadIdx.x;
  value = __shfl_xor_sync(ALL, value, 1);
  value = 100 * value + __shfl_up_sync(ALL, lane, 1);
  value = 100 * value + __shfl_down_sync(ALL, lane, 2);
  value = 100 * value + __shfl_sync(ALL, lane, 5);
  out[blockIdx.x * 96 + threadIdx.x] = value;
}

static __global__ void ballots_of_diverged_halves(int* out) {
  const int lane = threadIdx.x % 32;
  const unsigned half = lane < 16 ? 0x0000FFFF : 0xFFFF0000;
  unsigned votes = 0;
  if (lane < 16) {
    votes = __ballot_sync(half, lane % 2);
  } else {
    votes = __ballot_sync(half, lane % 3 == 0);
  }
  __syncwarp();
  out[blockIdx.x * 96 + threadIdx.x] = votes >> (lane & 16);
}

static __global__ void sum_by_atomics(int* out) {
  atomicAdd(&out[threadIdx.x % 4], static_cast<int>(threadIdx.x));
}

static __global__ void barrier_in_a_branch(int*) {
  if (threadIdx.x < 50) __syncthreads();
}

static __global__ void two_barriers(int*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

static __global__ void lane_not_in_mask(int*) { __ballot_sync(0x7FFFFFFF, 1); }

static __global__ void lane_returned(int*) {
  if (threadIdx.x == 3) return;
  __syncwarp();
}

static __global__ void lanes_disagree(int*) { __ballot_sync(threadIdx.x % 32 < 16 ? ALL : ALL - 1, 1); }

static __global__ void source_not_in_mask(int*) {
  if (threadIdx.x % 32 < 16) __shfl_sync(0x0000FFFF, 1, 20);
}

static __global__ void different_operations(int*) {
  if (threadIdx.x % 2) {
    __ballot_sync(ALL, 1);
  } else {
    __syncwarp();
  }
}

static __global__ void beyond_static_shared_memory(int* out) {
  __shared__ int values[96];
  values[threadIdx.x + out[0] + 1] = 5;
  out[1] = values[0];
}

static __global__ void beyond_dynamic_shared_memory(int* out) {
  cuda_emulation::dynamic_shared<int>()[threadIdx.x + out[0] + 1] = 0;
}

#define CASE(kernel) {#kernel, kernel}
static const std::map<std::string, void (*)(int*)> CASES{
    CASE(reversed_by_shared_memory),
    CASE(stale_shared_memory),
    CASE(shuffles),
    CASE(ballots_of_diverged_halves),
    CASE(sum_by_atomics),
    CASE(barrier_in_a_branch),
    CASE(two_barriers),
    CASE(lane_not_in_mask),
    CASE(lane_returned),
    CASE(lanes_disagree),
    CASE(source_not_in_mask),
    CASE(different_operations),
    CASE(beyond_static_shared_memory),
    CASE(beyond_dynamic_shared_memory),
};

int main(int, char** arguments) {
  using cuda_emulation::Schedule;
  int out[192] = {};
  try {
    for (Schedule schedule : {Schedule::forward, Schedule::reverse, Schedule::random}) {
      cuda_emulation::schedule = schedule;
      std::fill(std::begin(out), std::end(out), 0);
      NEUMUTER_LAUNCH(CASES.at(arguments[1]), 2, 96, 96 * sizeof(int), nullptr, out);
      for (int value : out) printf("%d ", value);
      printf("\n");
    }
  } catch (const std::runtime_error& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
