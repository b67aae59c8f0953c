// mute_ on the GPU: a block per token multiplies the few neurons of that token's mute set.
#pragma once

#include <cstdint>

#include "launch.cuh"

namespace neumuter::cuda {

constexpr int MUTE_THREADS = 128;

// `hidden` [tokens, width] with rows `stride` apart. Set s holds, for `layer`, the slots
// indptr[s · (layers + 1) + layer] up to the next entry of the pools `indices` and `gains` of `pool` slots.
// `rows[t]` is the set of token t; null: the tokens are `sets` equal runs. What lies outside is skipped:
// a check that raises would have to wait for the device.
template <typename T, typename Wide, typename Id>
__global__ void mute_kernel(T* hidden, int64_t tokens, int64_t width, int64_t stride, const int32_t* indptr,
                            int64_t sets, int64_t layers, int64_t layer, const int32_t* indices,
                            const float* gains, int64_t pool, const Id* rows) {
  for (int64_t t = blockIdx.x; t < tokens; t += gridDim.x) {
    const int64_t set = rows ? static_cast<int64_t>(rows[t]) : t / (tokens / sets);
    if (set < 0 || set >= sets) continue;
    const int32_t* ends = indptr + set * (layers + 1) + layer;
    const int64_t first = ends[0] < 0 ? 0 : ends[0], last = ends[1] > pool ? pool : ends[1];
    T* row = hidden + t * stride;
    for (int64_t slot = first + threadIdx.x; slot < last; slot += MUTE_THREADS) {
      const int32_t neuron = indices[slot];
      if (neuron < 0 || neuron >= width) continue;
      row[neuron] = static_cast<T>(static_cast<Wide>(row[neuron]) * static_cast<Wide>(gains[slot]));
    }
  }
}

template <typename T, typename Wide, typename Id>
void mute(T* hidden, int64_t tokens, int64_t width, int64_t stride, const int32_t* indptr, int64_t sets,
          int64_t layers, int64_t layer, const int32_t* indices, const float* gains, int64_t pool,
          const Id* rows, cudaStream_t stream) {
  if (tokens == 0 || sets == 0) return;
  const unsigned blocks = static_cast<unsigned>(tokens < (1 << 16) ? tokens : (1 << 16));
  NEUMUTER_LAUNCH((mute_kernel<T, Wide, Id>), dim3(blocks), dim3(MUTE_THREADS), 0, stream, hidden, tokens,
                  width, stride, indptr, sets, layers, layer, indices, gains, pool, rows);
}

}  // namespace neumuter::cuda
