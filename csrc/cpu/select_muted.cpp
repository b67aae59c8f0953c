// select_muted on the CPU.
//
// A sample of the scores gives a guess that is most likely a little above the cut, the score of the last
// neuron within the budget. One pass collects the few scores up to the guess; among them the cut is found
// exactly and the neurons are emitted in order. If the guess was too low, the pass is made again without one.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <tuple>

#include "../tensors.h"
#include "kernels.h"

namespace neumuter::cpu {

constexpr int64_t kChunk = 1 << 14;
constexpr int64_t kSample = 1 << 13;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A run of at most kChunk scores of one layer, and what was collected there.
struct Chunk {
  int64_t layer, first, n;
  int32_t neuron;         // of its first score
  int64_t collected = 0;  // scores, whose positions are at `first` in the common buffer
  int64_t below = 0, equal = 0;
  int64_t output = 0, ties = 0;  // where its neurons go, and how many at the cut are among them
};

template <typename F>
static void for_each_chunk(std::vector<Chunk>& chunks, F f) {
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) f(chunks[c]);
  });
}

// The score below or at which about `rank` of n scores lie, most likely a few more.
static float guess_cut(const float* scores, int64_t n, int64_t rank) {
  if (n <= 2 * kSample) return kInfinity;
  std::vector<float> sample(kSample);
  for (int64_t i = 0; i < kSample; ++i) {
    const float score = scores[i * n / kSample];
    sample[i] = score == score ? score : kInfinity;
  }
  const double share = static_cast<double>(rank) / n;
  const double above = share * kSample + 4 * std::sqrt(kSample * share * (1 - share)) + 8;
  if (above >= kSample) return kInfinity;
  std::nth_element(sample.begin(), sample.begin() + static_cast<int64_t>(above), sample.end());
  return sample[static_cast<int64_t>(above)];
}

class Selection {
 public:
  Selection(const float* scores, int64_t n, const std::vector<int64_t>& widths)
      : scores_(scores), n_(n), positions_(new int32_t[n]) {
    int64_t start = 0;
    for (int64_t layer = 0; layer < static_cast<int64_t>(widths.size()); ++layer) {
      STD_TORCH_CHECK(widths[layer] >= 0 && widths[layer] <= n - start,
                      "widths must not be negative and must sum to the number of scores");
      for (int64_t neuron = 0; neuron < widths[layer]; neuron += kChunk) {
        const int64_t size = std::min(kChunk, widths[layer] - neuron);
        chunks_.push_back({layer, start + neuron, size, static_cast<int32_t>(neuron)});
      }
      start += widths[layer];
    }
    STD_TORCH_CHECK(start == n, "widths must sum to the number of scores, ", n);
  }

  // Selects the `budget` lowest scores, the first ones among equals.
  void select_lowest(int64_t budget) {
    if (budget == 0) return;
    if (collect(guess_cut(scores_, n_, budget), true) < budget) collect(kInfinity, true);
    const float cut = score_of_rank(std::min(budget, collected()) - 1);
    for_each_chunk(chunks_, [&](Chunk& chunk) {
      for (int64_t i = 0; i < chunk.collected; ++i) {
        const float score = collected_score(chunk, i);
        chunk.below += score < cut;
        chunk.equal += score == cut;
      }
    });
    int64_t ties = std::min(budget, collected());
    for (const Chunk& chunk : chunks_) ties -= chunk.below;
    for (Chunk& chunk : chunks_) {
      chunk.ties = std::min(chunk.equal, ties);
      ties -= chunk.ties;
    }
    for_each_chunk(chunks_, [&](Chunk& chunk) { keep_up_to(chunk, cut); });
  }

  // Selects all scores below `threshold`.
  void select_below(float threshold) { collect(threshold, false); }

  // Writes what is selected and returns its number.
  int64_t emit(float gamma, float zeta, int32_t* indptr, int64_t layers, int32_t* indices, float* gains) {
    int64_t position = 0;
    std::fill(indptr, indptr + layers + 1, 0);
    for (Chunk& chunk : chunks_) {
      chunk.output = position;
      position += chunk.collected;
      indptr[chunk.layer + 1] = static_cast<int32_t>(position);
    }
    for (int64_t layer = 0; layer < layers; ++layer) {
      indptr[layer + 1] = std::max(indptr[layer + 1], indptr[layer]);  // a layer without neurons
    }
    for_each_chunk(chunks_, [&](Chunk& chunk) {
      float* scores = gains + chunk.output;
      for (int64_t i = 0; i < chunk.collected; ++i) {
        indices[chunk.output + i] = chunk.neuron + positions_[chunk.first + i];
        scores[i] = collected_score(chunk, i);
      }
      kernels().evaluation_gates(scores, chunk.collected, gamma, zeta);
    });
    return position;
  }

 private:
  const float* scores_;
  int64_t n_;
  std::unique_ptr<int32_t[]> positions_;  // not touched where nothing is collected
  std::vector<Chunk> chunks_;

  float collected_score(const Chunk& chunk, int64_t i) const {
    return scores_[chunk.first + positions_[chunk.first + i]];
  }

  int64_t collected() const {
    int64_t total = 0;
    for (const Chunk& chunk : chunks_) total += chunk.collected;
    return total;
  }

  int64_t collect(float cut, bool inclusive) {
    for_each_chunk(chunks_, [&](Chunk& chunk) {
      chunk.collected = kernels().collect_below(scores_ + chunk.first, static_cast<int32_t>(chunk.n), cut,
                                                inclusive, positions_.get() + chunk.first);
    });
    return collected();
  }

  float score_of_rank(int64_t rank) const {
    if (rank < 0) return -kInfinity;  // nothing but NaN
    std::vector<float> scores;
    scores.reserve(collected());
    for (const Chunk& chunk : chunks_) {
      for (int64_t i = 0; i < chunk.collected; ++i) scores.push_back(collected_score(chunk, i));
    }
    std::nth_element(scores.begin(), scores.begin() + rank, scores.end());
    return scores[rank];
  }

  // Drops what is above the cut, and what is at it once the chunk's ties are used up.
  void keep_up_to(Chunk& chunk, float cut) {
    int32_t* positions = positions_.get() + chunk.first;
    int64_t kept = 0, ties = chunk.ties;
    for (int64_t i = 0; i < chunk.collected; ++i) {
      const float score = collected_score(chunk, i);
      const bool tie = score == cut && ties > 0;
      ties -= tie;
      positions[kept] = positions[i];
      kept += score < cut || tie;
    }
    chunk.collected = kept;
  }
};

static std::tuple<Tensor, Tensor, Tensor> select_muted(Tensor scores_, std::vector<int64_t> widths,
                                                       std::optional<int64_t> budget, double threshold,
                                                       double gamma, double zeta) {
  STD_TORCH_CHECK(scores_.dim() == 1 && scores_.scalar_type() == ScalarType::Float,
                  "scores must be a flat float32 tensor");
  const Tensor scores = torch::stable::contiguous(scores_);
  const int64_t n = scores.numel(), layers = static_cast<int64_t>(widths.size());
  STD_TORCH_CHECK(n <= std::numeric_limits<int32_t>::max(), "scores must have fewer than 2^31 elements");
  STD_TORCH_CHECK(!budget || *budget >= 0, "budget must not be negative");
  const int64_t capacity = budget ? std::min(*budget, n) : n;
  Selection selection(static_cast<const float*>(scores.data_ptr()), n, widths);
  if (budget) {
    selection.select_lowest(capacity);
  } else {
    selection.select_below(static_cast<float>(threshold));
  }

  Tensor indptr = torch::stable::new_empty(scores, {layers + 1}, ScalarType::Int);
  Tensor indices = torch::stable::new_empty(scores, {capacity}, ScalarType::Int);
  Tensor gains = torch::stable::new_empty(scores, {capacity});
  int32_t* index = static_cast<int32_t*>(indices.data_ptr());
  float* gain = static_cast<float*>(gains.data_ptr());
  const int64_t count = selection.emit(static_cast<float>(gamma), static_cast<float>(zeta),
                                       static_cast<int32_t*>(indptr.data_ptr()), layers, index, gain);
  std::fill(index + count, index + capacity, -1);
  std::fill(gain + count, gain + capacity, 1.0f);
  return {indptr, indices, gains};
}

STABLE_TORCH_LIBRARY_IMPL(neumuter, CPU, m) { m.impl("select_muted", TORCH_BOX(&select_muted)); }

}  // namespace neumuter::cpu
