// mute_ on the GPU: the op around the kernel of mute.cuh. Nothing is allocated and nothing waits, so it
// can be captured in a CUDA graph.
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../mute.h"
#include "mute.cuh"
#include "stream.h"

namespace neumuter::cuda {

template <typename T, typename Wide>
static void mute_rows(const Mutes& in, cudaStream_t stream) {
  const auto launch = [&](const auto* rows) {
    mute<T, Wide>(static_cast<T*>(in.hidden.tensor.data_ptr()), in.hidden.rows, in.hidden.columns,
                  in.hidden.stride, static_cast<const int32_t*>(in.indptr.data_ptr()), in.sets, in.layers,
                  in.layer, static_cast<const int32_t*>(in.indices.data_ptr()),
                  static_cast<const float*>(in.gains.data_ptr()), in.pool, rows, stream);
  };
  if (in.rows && in.rows->scalar_type() == ScalarType::Int) {
    launch(static_cast<const int32_t*>(in.rows->data_ptr()));
  } else {
    launch(in.rows ? static_cast<const int64_t*>(in.rows->data_ptr()) : nullptr);
  }
}

static void mute_op(Tensor hidden, Tensor indptr, Tensor indices, Tensor gains, std::optional<Tensor> row_ids,
                    int64_t layer) {
  const Mutes in(hidden, indptr, indices, gains, row_ids, layer);
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device());
  const cudaStream_t stream = current_stream(hidden.get_device());
  switch (hidden.scalar_type()) {
    case ScalarType::Float:
      mute_rows<float, float>(in, stream);
      break;
    case ScalarType::Double:
      mute_rows<double, double>(in, stream);
      break;
    case ScalarType::BFloat16:
      mute_rows<torch::headeronly::BFloat16, float>(in, stream);
      break;
    case ScalarType::Half:
      mute_rows<torch::headeronly::Half, float>(in, stream);
      break;
    default:
      STD_TORCH_CHECK(false, "hidden must be float32, float64, bfloat16 or float16");
  }
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "mute_: ", cudaGetErrorString(error));
}

STABLE_TORCH_LIBRARY_IMPL(neumuter, CUDA, m) { m.impl("mute_", TORCH_BOX(&mute_op)); }

}  // namespace neumuter::cuda
