// Compaction of the neurons to mute, on the GPU: kernels and launch code, free of torch.
//
// Every score gets a 32-bit key whose unsigned order is the order of the scores. A radix select finds
// the pivot (the key of the last neuron within the budget) and how many of the neurons at the pivot
// are still within it; for a threshold the pivot is known and none is. With L(p) and E(p) the numbers
// of neurons below and at the pivot in front of flat position p, then
//     rank(p) = L(p) + min(E(p), ties)
// neurons in front of p are selected: the neuron at p is selected if rank grows there, its slot is
// rank(p), and indptr[l] is rank(start of layer l). Ties are thus broken by position, and slots ascend.
//
// Launches: prepare, three histograms, count, emit (a threshold skips the histograms). A launch that
// needs the pivot so far works it out from the previous histogram in every block: that takes as long
// as letting the last block of the previous launch do it, and needs neither tickets nor fences.
//
// Memory accesses that race by design. Only the atomic additions of `histogram`, to its bins in
// shared memory and to those in global memory: additions of integers, whose order does not matter,
// read only after a barrier (shared) or by a later launch of the same stream (global). Everything
// else is written by one thread of the grid and read by later launches, or by one thread of the
// block and read behind a barrier; slots of `indices` and `gains` are disjoint, since ranks are.
//
// The block scan is written by hand rather than taken from CUB because the emulator of
// tests/cuda_emulation, which runs this very file on the CPU, cannot run CUB; it scans one value per
// thread, so there is nothing to gain.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../exact_math.h"
#include "launch.cuh"

namespace neumuter::cuda {

constexpr int WARP = 32;
constexpr int THREADS = 256;
constexpr int ITEMS = 4;  // scores per thread and tile
constexpr uint32_t TILE = THREADS * ITEMS;
constexpr uint32_t MAX_BLOCKS = 1024;  // so that each block can add up the counts of all blocks
constexpr int LAYERS_PER_LAUNCH = 512;
constexpr int PASSES = 3;
constexpr int BINS = 2048;
constexpr uint32_t NAN_KEY = 0xFFFFFFFF;  // above every score, and of nothing but NaN

// Pass p resolves the 11 bits of the key from this one up. The last two passes share bit 10, which is
// the same in all keys that the last one counts.
NEUMUTER_HOST_DEVICE constexpr int digit_shift(int pass) { return pass == 0 ? 21 : pass == 1 ? 10 : 0; }

struct Pivot {
  uint32_t key;   // the digits resolved so far, zeros below
  uint32_t ties;  // how many of the keys that begin with these digits are within the budget
};

// Neurons below the pivot in the low half, neurons at the pivot in the high half.
using Count = uint64_t;

struct Scratch {
  Pivot pivots[PASSES + 1];  // [p]: before pass p; the last one is final
  uint32_t histograms[PASSES][BINS];
  Count counts[MAX_BLOCKS];
};  // uint32 starts[n_layers + 1] follow: the flat positions at which the layers start, and n

struct LayerBatch {
  uint32_t first, count;
  uint32_t starts[LAYERS_PER_LAUNCH];
};

NEUMUTER_HOST_DEVICE uint32_t sort_key(float score) {
  const uint32_t bits = bit_copy<uint32_t>(score);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return NAN_KEY;
  if (bits == 0x80000000) return 0x80000000;  // −0 is +0
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

NEUMUTER_HOST_DEVICE Count count_key(uint32_t key, uint32_t pivot) {
  return static_cast<Count>(key < pivot) | static_cast<Count>(key == pivot) << 32;
}

NEUMUTER_HOST_DEVICE uint32_t rank_after(Count before, uint32_t ties) {
  const uint32_t below = static_cast<uint32_t>(before), at = static_cast<uint32_t>(before >> 32);
  return below + (at < ties ? at : ties);
}

// The keys of `first`, `first + stride`, ...; NAN_KEY from n on.
static __device__ __forceinline__ void load_keys(const float* scores, uint32_t n, uint32_t first,
                                                 uint32_t stride, uint32_t (&keys)[ITEMS]) {
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const uint32_t position = first + i * stride;
    keys[i] = position < n ? sort_key(scores[position]) : NAN_KEY;
  }
}

struct BlockScan {
  Count before;  // the sum over the threads in front of this one
  Count total;
};

static __device__ __forceinline__ BlockScan block_scan(Count value) {
  __shared__ Count warp_sums[THREADS / WARP];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  Count sum = value;
#pragma unroll
  for (int distance = 1; distance < WARP; distance *= 2) {
    const Count left = __shfl_up_sync(0xFFFFFFFF, sum, distance);
    if (lane >= distance) sum += left;
  }
  if (lane == WARP - 1) warp_sums[warp] = sum;
  __syncthreads();
  BlockScan scan{sum - value, 0};
#pragma unroll
  for (int w = 0; w < THREADS / WARP; ++w) {
    if (w < warp) scan.before += warp_sums[w];
    scan.total += warp_sums[w];
  }
  __syncthreads();  // the next scan may overwrite warp_sums
  return scan;
}

// The pivot before pass `PASS` (after it, for its last value), the same in all blocks.
template <int PASS>
static __device__ __forceinline__ Pivot find_pivot(Scratch* scratch) {
  if constexpr (PASS == 0) {
    return scratch->pivots[0];
  } else {
    constexpr int PER_THREAD = BINS / THREADS;
    __shared__ Pivot refined;
    const Pivot coarse = scratch->pivots[PASS - 1];
    const uint32_t first = threadIdx.x * PER_THREAD;
    uint32_t bins[PER_THREAD];
    Count sum = 0;
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) sum += bins[i] = scratch->histograms[PASS - 1][first + i];
    uint32_t before = static_cast<uint32_t>(block_scan(sum).before);
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
      if (before < coarse.ties && coarse.ties <= before + bins[i]) {  // in one bin of one thread
        const uint32_t key = coarse.key | (first + i) << digit_shift(PASS - 1);
        refined = {key, key == NAN_KEY ? 0 : coarse.ties - before};
      }
      before += bins[i];
    }
    __syncthreads();
    if (blockIdx.x == 0 && threadIdx.x == 0) scratch->pivots[PASS] = refined;
    return refined;
  }
}

static __global__ void __launch_bounds__(THREADS)
    prepare(Scratch* scratch, Pivot pivot, bool by_rank, LayerBatch batch) {
  const uint32_t thread = blockIdx.x * THREADS + threadIdx.x;
  uint32_t* starts = reinterpret_cast<uint32_t*>(scratch + 1) + batch.first;
  if (thread == 0) scratch->pivots[by_rank ? 0 : PASSES] = pivot;
  scratch->histograms[thread / BINS][thread % BINS] = 0;
  if (thread < batch.count) starts[thread] = batch.starts[thread];
}

template <int PASS>
static __global__ void __launch_bounds__(THREADS)
    histogram(const float* __restrict__ scores, uint32_t n, uint32_t chunk, Scratch* scratch) {
  __shared__ uint32_t bins[BINS];
  const Pivot pivot = find_pivot<PASS>(scratch);
  for (int b = threadIdx.x; b < BINS; b += THREADS) bins[b] = 0;
  __syncthreads();
  const uint32_t begin = blockIdx.x * chunk;
  for (uint32_t tile = begin; tile < begin + chunk; tile += TILE) {
    uint32_t keys[ITEMS];
    load_keys(scores, n, tile + threadIdx.x, THREADS, keys);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      if (PASS == 0 || keys[i] >> digit_shift(PASS - 1) == pivot.key >> digit_shift(PASS - 1)) {
        // Adding the constant 1 is one instruction that sums up equal addresses of a warp (in SASS
        // ATOMS.POPC.INC), so that equal scores cost no more than different ones.
        atomicAdd(&bins[keys[i] >> digit_shift(PASS) & (BINS - 1)], 1u);
      }
    }
  }
  __syncthreads();
  for (int b = threadIdx.x; b < BINS; b += THREADS) {
    if (bins[b]) atomicAdd(&scratch->histograms[PASS][b], bins[b]);
  }
}

static __global__ void __launch_bounds__(THREADS)
    count(const float* __restrict__ scores, uint32_t n, uint32_t chunk, bool by_rank, Scratch* scratch) {
  const Pivot pivot = by_rank ? find_pivot<PASSES>(scratch) : scratch->pivots[PASSES];
  const uint32_t begin = blockIdx.x * chunk;
  Count mine = 0;
  for (uint32_t tile = begin; tile < begin + chunk; tile += TILE) {
    uint32_t keys[ITEMS];
    load_keys(scores, n, tile + threadIdx.x, THREADS, keys);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) mine += count_key(keys[i], pivot.key);
  }
  const Count total = block_scan(mine).total;
  if (threadIdx.x == 0) scratch->counts[blockIdx.x] = total;
}

// The last of the ascending `starts` that is not behind `position`: the start of its layer.
static __device__ __forceinline__ uint32_t start_of_layer(const uint32_t* starts, int32_t n_layers,
                                                          uint32_t position) {
  int32_t low = 0, high = n_layers;  // starts[low] <= position < starts[high]
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (starts[middle] <= position) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return starts[low];
}

static __global__ void __launch_bounds__(THREADS)
    emit(const float* __restrict__ scores, uint32_t n, uint32_t chunk, int32_t n_layers, float gamma,
         float zeta, const Scratch* scratch, int32_t* indptr, int32_t* indices, float* gains,
         int64_t capacity) {
  __shared__ uint32_t ranks[TILE + 1];  // of the positions of a tile, and of the next one
  const uint32_t* starts = reinterpret_cast<const uint32_t*>(scratch + 1);
  const Pivot pivot = scratch->pivots[PASSES];

  Count mine_before = 0, mine_total = 0;
  for (uint32_t b = threadIdx.x; b < gridDim.x; b += THREADS) {
    mine_total += scratch->counts[b];
    if (b < blockIdx.x) mine_before += scratch->counts[b];
  }
  Count tile_before = block_scan(mine_before).total;
  const uint32_t selected = rank_after(block_scan(mine_total).total, pivot.ties);

  const uint32_t begin = blockIdx.x * chunk;
  for (uint32_t tile = begin; tile < begin + chunk; tile += TILE) {
    uint32_t keys[ITEMS];
    load_keys(scores, n, tile + threadIdx.x * ITEMS, 1, keys);
    Count mine = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) mine += count_key(keys[i], pivot.key);
    const BlockScan scan = block_scan(mine);

    Count before = tile_before + scan.before;
    if (threadIdx.x == 0) ranks[0] = rank_after(before, pivot.ties);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      before += count_key(keys[i], pivot.key);
      ranks[threadIdx.x * ITEMS + i + 1] = rank_after(before, pivot.ties);
    }
    tile_before += scan.total;
    __syncthreads();

    for (uint32_t offset = threadIdx.x; offset < TILE; offset += THREADS) {
      const uint32_t position = tile + offset, rank = ranks[offset];
      if (ranks[offset + 1] > rank && rank < capacity) {
        indices[rank] = static_cast<int32_t>(position - start_of_layer(starts, n_layers, position));
        gains[rank] = evaluation_gate(scores[position], gamma, zeta);
      }
    }
    for (int32_t layer = threadIdx.x; layer <= n_layers; layer += THREADS) {
      const uint32_t offset = starts[layer] - tile;  // huge if in front of the tile
      if (offset < TILE && starts[layer] < n) indptr[layer] = ranks[offset];
    }
  }

  if (blockIdx.x == 0) {  // layers that start at the end: empty ones, and the total
    for (int32_t layer = threadIdx.x; layer <= n_layers; layer += THREADS) {
      if (starts[layer] == n) indptr[layer] = selected;
    }
  }
  for (int64_t slot = selected + blockIdx.x * THREADS + threadIdx.x; slot < capacity;
       slot += gridDim.x * THREADS) {
    indices[slot] = -1;
    gains[slot] = 1.0f;
  }
}

// Bytes of device scratch that select_muted needs for n scores in n_layers layers; 8-byte aligned.
inline size_t select_muted_workspace(int64_t /*n*/, int64_t n_layers) {
  return sizeof(Scratch) + static_cast<size_t>(n_layers + 1) * sizeof(uint32_t);
}

// Selects neurons to mute among the flat `scores` (device, float32 [n]) of layers of the given
// `widths` (host, int64 [n_layers], zeros allowed, sum n < 2^31).
//
// budget >= 0: the min(budget, n) lowest scores, ties by position. budget < 0: all scores < threshold
// (a score). NaN is never selected and −0 equals +0. Writes, on the device: `indptr` int32
// [n_layers + 1]; `indices` int32 [capacity], ascending within each layer; `gains` float32 [capacity],
// the evaluation gates clamp(σ(s)·(ζ − γ) + γ, 0, 1). Slots from indptr[n_layers] on hold −1 and 1;
// neurons from `capacity` on are counted in indptr and dropped.
//
// Only launches kernels on `stream`: no allocation, no copy, no synchronisation, so a CUDA graph can
// capture it. Returns cudaErrorInvalidValue for sizes that break the contract, or the launch's error.
inline cudaError_t select_muted(const float* scores, const int64_t* widths, int64_t n_layers, int64_t n,
                                int64_t budget, float threshold, float gamma, float zeta, void* workspace,
                                int32_t* indptr, int32_t* indices, float* gains, int64_t capacity,
                                cudaStream_t stream) {
  if (n < 0 || n > INT32_MAX || n_layers < 0 || n_layers >= INT32_MAX || capacity < 0) {
    return cudaErrorInvalidValue;
  }
  int64_t rest = n;
  for (int64_t layer = 0; layer < n_layers; ++layer) {
    if (widths[layer] < 0 || widths[layer] > rest) return cudaErrorInvalidValue;
    rest -= widths[layer];
  }
  if (rest != 0) return cudaErrorInvalidValue;

  const bool by_rank = budget > 0 && n > 0;
  Pivot pivot{0, 0};  // selects nothing
  if (by_rank) {
    pivot.ties = static_cast<uint32_t>(budget < n ? budget : n);
  } else if (budget < 0 && threshold == threshold) {
    pivot.key = sort_key(threshold);
  }

  Scratch* scratch = static_cast<Scratch*>(workspace);
  LayerBatch batch{};
  int64_t start = 0;
  for (int64_t layer = 0; layer <= n_layers; ++layer) {
    batch.starts[batch.count++] = static_cast<uint32_t>(start);
    if (batch.count == LAYERS_PER_LAUNCH || layer == n_layers) {
      static_assert(LAYERS_PER_LAUNCH <= PASSES * BINS);
      NEUMUTER_LAUNCH(prepare, PASSES * BINS / THREADS, THREADS, 0, stream, scratch, pivot, by_rank, batch);
      batch.first += batch.count;
      batch.count = 0;
    }
    if (layer < n_layers) start += widths[layer];
  }

  const uint32_t size = static_cast<uint32_t>(n);
  const uint32_t tiles = size == 0 ? 1 : (size - 1) / TILE + 1;
  const uint32_t tiles_per_block = (tiles - 1) / MAX_BLOCKS + 1;
  const uint32_t blocks = (tiles - 1) / tiles_per_block + 1, chunk = tiles_per_block * TILE;
  if (by_rank) {
    NEUMUTER_LAUNCH(histogram<0>, blocks, THREADS, 0, stream, scores, size, chunk, scratch);
    NEUMUTER_LAUNCH(histogram<1>, blocks, THREADS, 0, stream, scores, size, chunk, scratch);
    NEUMUTER_LAUNCH(histogram<2>, blocks, THREADS, 0, stream, scores, size, chunk, scratch);
  }
  NEUMUTER_LAUNCH(count, blocks, THREADS, 0, stream, scores, size, chunk, by_rank, scratch);
  NEUMUTER_LAUNCH(emit, blocks, THREADS, 0, stream, scores, size, chunk, static_cast<int32_t>(n_layers),
                  gamma, zeta, scratch, indptr, indices, gains, capacity);
  return cudaGetLastError();
}

}  // namespace neumuter::cuda
