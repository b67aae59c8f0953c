// The stream that torch works on.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

// Weak: a CUDA build of this library also loads beside a torch without CUDA, where nobody calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace neumuter::cuda {

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                  "the current CUDA stream is not to be had");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace neumuter::cuda
