// The stream that torch works on.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

// Weak, so that a CUDA build of this library also loads with a torch without CUDA, which never calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace neumuter::cuda {

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  const AOTITorchError error = aoti_torch_get_current_cuda_stream(device, &stream);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "cannot get the current CUDA stream of device ", device,
                  ": torch returned error ", error);
  return static_cast<cudaStream_t>(stream);
}

}  // namespace neumuter::cuda
