// mute_ on the CPU: touches only the muted neurons of each token.
#include "../mute.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

namespace neumuter::cpu {

constexpr int64_t kGrain = 1 << 12;  // neurons that are worth a thread

// The slots of each token, [2, tokens]: checked before anything is changed.
template <typename Id>
static void find_slots(const Mutes& in, const Id* rows, std::vector<int64_t>& slots) {
  const auto* indptr = static_cast<const int32_t*>(in.indptr.data_ptr());
  const auto* indices = static_cast<const int32_t*>(in.indices.data_ptr());
  const int64_t tokens = in.hidden.rows;
  int64_t known = -1;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t set = rows ? static_cast<int64_t>(rows[t]) : t / (tokens / in.sets);
    STD_TORCH_CHECK(set >= -1 && set < in.sets, "row_ids must lie in [-1, ", in.sets, "), got ", set);
    if (set < 0) {
      slots[2 * t] = slots[2 * t + 1] = 0;
      continue;
    }
    const int32_t* ends = indptr + set * (in.layers + 1) + in.layer;
    STD_TORCH_CHECK(0 <= ends[0] && ends[0] <= ends[1] && ends[1] <= in.pool, "indptr of set ", set,
                    " must ascend within the ", in.pool, " slots, got ", ends[0], " and ", ends[1]);
    if (set != known) {
      for (int64_t slot = ends[0]; slot < ends[1]; ++slot) {
        STD_TORCH_CHECK(indices[slot] >= 0 && indices[slot] < in.hidden.columns, "indices must lie in [0, ",
                        in.hidden.columns, "), got ", indices[slot]);
      }
      known = set;
    }
    slots[2 * t] = ends[0];
    slots[2 * t + 1] = ends[1];
  }
}

template <typename T, typename Wide>
static void mute_rows(const Mutes& in, const std::vector<int64_t>& slots) {
  const auto* indices = static_cast<const int32_t*>(in.indices.data_ptr());
  const auto* gains = static_cast<const float*>(in.gains.data_ptr());
  const int64_t tokens = in.hidden.rows;
  const int64_t each = std::max<int64_t>(in.pool / std::max<int64_t>(in.sets * in.layers, 1), 1);
  T* hidden = static_cast<T*>(in.hidden.tensor.data_ptr());
  torch::stable::parallel_for(
      0, tokens, std::max<int64_t>(kGrain / each, 1), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          T* row = hidden + t * in.hidden.stride;
          for (int64_t slot = slots[2 * t]; slot < slots[2 * t + 1]; ++slot) {
            T& neuron = row[indices[slot]];
            neuron = static_cast<T>(static_cast<Wide>(neuron) * static_cast<Wide>(gains[slot]));
          }
        }
      });
}

static void mute_(Tensor hidden, Tensor indptr, Tensor indices, Tensor gains, std::optional<Tensor> row_ids,
                  int64_t layer) {
  const Mutes in(hidden, indptr, indices, gains, row_ids, layer);
  std::vector<int64_t> slots(2 * in.hidden.rows);
  if (in.rows && in.rows->scalar_type() == ScalarType::Int) {
    find_slots(in, static_cast<const int32_t*>(in.rows->data_ptr()), slots);
  } else {
    find_slots(in, in.rows ? static_cast<const int64_t*>(in.rows->data_ptr()) : nullptr, slots);
  }
  switch (hidden.scalar_type()) {
    case ScalarType::Float:
      return mute_rows<float, float>(in, slots);
    case ScalarType::Double:
      return mute_rows<double, double>(in, slots);
    case ScalarType::BFloat16:
      return mute_rows<torch::headeronly::BFloat16, float>(in, slots);
    case ScalarType::Half:
      return mute_rows<torch::headeronly::Half, float>(in, slots);
    default:
      STD_TORCH_CHECK(false, "hidden must be float32, float64, bfloat16 or float16");
  }
}

STABLE_TORCH_LIBRARY_IMPL(neumuter, CPU, m) { m.impl("mute_", TORCH_BOX(&mute_)); }

}  // namespace neumuter::cpu
