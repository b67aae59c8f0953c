// CUDA's driver, as far as launching a compiled kernel needs it. It is found at run time: the extension is
// neither linked with CUDA nor compiled with its headers, and loads where there is no GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace neumuter::launch {

using Function = void*;  // CUfunction
using Stream = void*;    // CUstream

// Why the driver cannot be used; empty if it can.
const std::string& why_no_driver();

// The offset and the size in bytes of each parameter of a kernel, as the driver knows them.
std::vector<std::pair<std::size_t, std::size_t>> parameters_of(Function kernel);

struct Shape {
  unsigned grid[3];
  unsigned threads;  // of a block
  unsigned shared;   // bytes of dynamic shared memory of a block
};

// Launches on a stream of the device, which is the current one of this thread.
void launch_kernel(Function kernel, const Shape& shape, int32_t device, Stream stream, void** parameters);

}  // namespace neumuter::launch
