// select_muted on the CPU: radix select of the threshold, then one pass that emits in order.
#include <algorithm>
#include <array>
#include <limits>
#include <tuple>

#include "../exact_math.h"
#include "../tensors.h"

namespace neumuter::cpu {

constexpr int64_t kChunk = 1 << 14;
constexpr uint32_t kNotANumber = 0xFFFFFFFFu;

// Unsigned keys in the order of the scores: −0 equals +0, NaN comes after everything.
static inline uint32_t key_of(float score) {
  const uint32_t bits = bit_copy<uint32_t>(score == 0.0f ? 0.0f : score);
  const uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return score != score ? kNotANumber : key;
}

// A run of at most kChunk scores of one layer.
struct Chunk {
  int64_t layer, first, last;
  int64_t below = 0, equal = 0;  // scores below and at the cut
};

template <typename F>
static void for_each_chunk(std::vector<Chunk>& chunks, F f) {
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 2, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) f(chunks[c]);
  });
}

// The key of rank `rank` (from 0) among all scores; NaNs rank last.
static uint32_t key_of_rank(const float* scores, std::vector<Chunk>& chunks, int64_t rank) {
  constexpr int kBits[3] = {11, 11, 10};
  uint32_t prefix = 0;
  int shift = 32;
  for (int bits : kBits) {
    const uint32_t prefix_mask = shift == 32 ? 0u : ~0u << shift;
    shift -= bits;
    using Histogram = std::array<int32_t, 2048>;
    const int64_t tasks = std::min<int64_t>(torch::stable::get_num_threads(), chunks.size());
    std::vector<Histogram> histograms(tasks);
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        Histogram& histogram = histograms[task];
        histogram.fill(0);
        const int64_t n = static_cast<int64_t>(chunks.size());
        for (int64_t c = task * n / tasks; c < (task + 1) * n / tasks; ++c) {
          for (int64_t i = chunks[c].first; i < chunks[c].last; ++i) {
            const uint32_t key = key_of(scores[i]);
            histogram[(key >> shift) & ((1u << bits) - 1)] += (key & prefix_mask) == prefix;
          }
        }
      }
    });
    uint32_t digit = 0;
    for (;; ++digit) {
      int64_t count = 0;
      for (const Histogram& histogram : histograms) count += histogram[digit];
      if (rank < count) break;
      rank -= count;
    }
    prefix |= digit << shift;
  }
  return prefix;
}

static std::tuple<Tensor, Tensor, Tensor> select_muted(Tensor scores_, std::vector<int64_t> widths,
                                                       std::optional<int64_t> budget, double threshold,
                                                       double gamma, double zeta) {
  STD_TORCH_CHECK(scores_.dim() == 1 && scores_.scalar_type() == ScalarType::Float,
                  "scores must be a flat float32 tensor");
  const Tensor tensor = torch::stable::contiguous(scores_);
  const float* scores = static_cast<const float*>(tensor.data_ptr());
  const int64_t n = tensor.numel(), layers = static_cast<int64_t>(widths.size());
  STD_TORCH_CHECK(n <= std::numeric_limits<int32_t>::max(), "scores must have fewer than 2^31 elements");
  STD_TORCH_CHECK(!budget || *budget >= 0, "budget must not be negative");

  std::vector<Chunk> chunks;
  int64_t start = 0;
  std::vector<int64_t> starts;
  for (int64_t layer = 0; layer < layers; ++layer) {
    STD_TORCH_CHECK(widths[layer] >= 0 && widths[layer] <= n - start,
                    "widths must not be negative and must sum to the number of scores");
    starts.push_back(start);
    for (int64_t first = start; first < start + widths[layer]; first += kChunk) {
      chunks.push_back({layer, first, std::min(first + kChunk, start + widths[layer])});
    }
    start += widths[layer];
  }
  STD_TORCH_CHECK(start == n, "widths must sum to the number of scores, ", n);

  const int64_t capacity = budget ? std::min(*budget, n) : n;
  const std::vector<int64_t> shape{capacity};
  Tensor indptr = torch::stable::new_zeros(tensor, {layers + 1}, ScalarType::Int);
  Tensor indices = torch::stable::new_empty(tensor, shape, ScalarType::Int);
  Tensor gains = torch::stable::new_empty(tensor, shape);
  int32_t* indptr_out = static_cast<int32_t*>(indptr.data_ptr());
  int32_t* index_out = static_cast<int32_t*>(indices.data_ptr());
  float* gain_out = static_cast<float*>(gains.data_ptr());

  // Selected are the scores below the cut, and the first `ties` of those equal to it.
  uint32_t cut = 0;
  int64_t ties = 0;
  if (!budget) {
    const float t = static_cast<float>(threshold);
    cut = t != t ? 0 : key_of(t);
  } else if (capacity > 0) {
    cut = key_of_rank(scores, chunks, capacity - 1);
  }
  for_each_chunk(chunks, [&](Chunk& chunk) {
    int32_t below = 0, equal = 0;
    for (int64_t i = chunk.first; i < chunk.last; ++i) {
      const uint32_t key = key_of(scores[i]);
      below += key < cut;
      equal += key == cut;
    }
    chunk.below = below;
    chunk.equal = equal;
  });
  if (budget && cut != kNotANumber) {
    ties = capacity;
    for (const Chunk& chunk : chunks) ties -= chunk.below;
  }

  // From here on `below` is where a chunk's output starts and `equal` how many ties it may take.
  int64_t position = 0;
  for (Chunk& chunk : chunks) {
    const int64_t taken = std::min(chunk.equal, ties);
    ties -= taken;
    const int64_t count = chunk.below + taken;
    chunk.below = position;
    chunk.equal = taken;
    position += count;
    indptr_out[chunk.layer + 1] = static_cast<int32_t>(position);
  }
  for (int64_t layer = 0; layer < layers; ++layer) {
    if (widths[layer] == 0) indptr_out[layer + 1] = indptr_out[layer];
  }
  const float low = static_cast<float>(gamma), high = static_cast<float>(zeta);
  for_each_chunk(chunks, [&](Chunk& chunk) {
    int64_t at = chunk.below, left = chunk.equal;
    for (int64_t i = chunk.first; i < chunk.last; ++i) {
      const uint32_t key = key_of(scores[i]);
      if (key > cut || (key == cut && left == 0)) continue;
      left -= key == cut;
      index_out[at] = static_cast<int32_t>(i - starts[chunk.layer]);
      gain_out[at++] = evaluation_gate(scores[i], low, high);
    }
  });
  std::fill(index_out + position, index_out + capacity, -1);
  std::fill(gain_out + position, gain_out + capacity, 1.0f);
  return {indptr, indices, gains};
}

STABLE_TORCH_LIBRARY_IMPL(neumuter, CPU, m) { m.impl("select_muted", TORCH_BOX(&select_muted)); }

}  // namespace neumuter::cpu
