// How our torch-free CUDA headers launch a kernel, so that both nvcc and a plain C++ compiler (with
// the emulator of tests/cuda_emulation on its include path) can compile them.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
// NEUMUTER_LAUNCH(kernel, grid, block, bytes of dynamic shared memory, stream, arguments...)
#define NEUMUTER_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#else
#include "cuda_emulation.h"
#define NEUMUTER_LAUNCH(kernel, grid, block, shared, stream, ...) \
  cuda_emulation::launch(kernel, grid, block, shared, stream, __VA_ARGS__)
#endif
