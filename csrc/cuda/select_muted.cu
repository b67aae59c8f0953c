// select_muted on the GPU: the op around the kernels of select_muted.cuh.
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <tuple>

#include "../tensors.h"
#include "select_muted.cuh"
#include "stream.h"

namespace neumuter::cuda {

static std::tuple<Tensor, Tensor, Tensor> select_muted_op(Tensor scores_, std::vector<int64_t> widths,
                                                          std::optional<int64_t> budget, double threshold,
                                                          double gamma, double zeta) {
  STD_TORCH_CHECK(scores_.dim() == 1 && scores_.scalar_type() == ScalarType::Float,
                  "scores must be a flat float32 tensor");
  STD_TORCH_CHECK(!budget || *budget >= 0, "budget must not be negative");
  const torch::stable::accelerator::DeviceGuard guard(scores_.get_device());
  const cudaStream_t stream = current_stream(scores_.get_device());

  const Tensor scores = torch::stable::contiguous(scores_);
  const int64_t n = scores.numel(), layers = static_cast<int64_t>(widths.size());
  const int64_t capacity = budget ? std::min(*budget, n) : n;
  const std::vector<int64_t> shape{capacity};
  Tensor indptr = torch::stable::new_empty(scores, {layers + 1}, ScalarType::Int);
  Tensor indices = torch::stable::new_empty(scores, shape, ScalarType::Int);
  Tensor gains = torch::stable::new_empty(scores, shape);
  const int64_t bytes = static_cast<int64_t>(select_muted_workspace(n, layers));
  Tensor workspace = torch::stable::new_empty(scores, {bytes}, ScalarType::Byte);
  const cudaError_t error = select_muted(
      static_cast<const float*>(scores.data_ptr()), widths.data(), layers, n, budget ? *budget : -1,
      static_cast<float>(threshold), static_cast<float>(gamma), static_cast<float>(zeta),
      workspace.data_ptr(), static_cast<int32_t*>(indptr.data_ptr()),
      static_cast<int32_t*>(indices.data_ptr()), static_cast<float*>(gains.data_ptr()), capacity, stream);
  STD_TORCH_CHECK(error != cudaErrorInvalidValue,
                  "widths must not be negative and must sum to the number of ",
                  "scores, which must be less than 2^31");
  STD_TORCH_CHECK(error == cudaSuccess, "select_muted: ", cudaGetErrorString(error));
  return {indptr, indices, gains};
}

STABLE_TORCH_LIBRARY_IMPL(neumuter, CUDA, m) { m.impl("select_muted", TORCH_BOX(&select_muted_op)); }

}  // namespace neumuter::cuda
