// hard_concrete and its backward on the CPU.
#include <algorithm>

#include "../tensors.h"
#include "kernels.h"

namespace neumuter::cpu {

constexpr int64_t kNeurons = 4096;  // per block

struct GateInput {
  Dtype dtype;
  Tensor scores, ids;
  int64_t rows, neurons;
  Gates gates;

  GateInput(const Tensor& scores_, const Tensor& sample_ids, const Tensor& step, int64_t seed, int64_t layer,
            double temperature, double gamma, double zeta, bool training)
      : scores(torch::stable::contiguous(scores_)), ids(torch::stable::contiguous(sample_ids)) {
    STD_TORCH_CHECK(scores.dim() == 1, "scores must have shape [F]");
    STD_TORCH_CHECK(ids.dim() == 1 && ids.scalar_type() == ScalarType::Long,
                    "sample_ids must be int64 [rows]");
    STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Float || scores.scalar_type() == ScalarType::Double,
                    "scores must be float32 or float64");
    STD_TORCH_CHECK(step.numel() == 1 && step.scalar_type() == ScalarType::Long, "step must be one int64");
    dtype = scores.scalar_type() == ScalarType::Double ? Dtype::kDouble : Dtype::kFloat;
    rows = ids.numel();
    neurons = scores.numel();
    gates = {static_cast<uint64_t>(seed),
             static_cast<uint32_t>(*static_cast<const int64_t*>(step.data_ptr())),
             static_cast<uint32_t>(layer),
             temperature,
             gamma,
             zeta,
             training};
  }

  uint32_t sample(int64_t row) const {
    return static_cast<uint32_t>(static_cast<const int64_t*>(ids.data_ptr())[row]);
  }
  int64_t blocks() const { return (neurons + kNeurons - 1) / kNeurons; }
  int64_t row_bytes() const { return neurons * static_cast<int64_t>(scores.element_size()); }

  // f(first, last) for each block of neurons, in parallel.
  template <typename F>
  void for_each_block(F f) const {
    torch::stable::parallel_for(0, blocks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        f(b * kNeurons, std::min((b + 1) * kNeurons, neurons));
      }
    });
  }
};

static Tensor hard_concrete(Tensor scores, Tensor sample_ids, Tensor step, int64_t seed, int64_t layer,
                            double temperature, double gamma, double zeta, bool training) {
  const GateInput in(scores, sample_ids, step, seed, layer, temperature, gamma, zeta, training);
  Tensor out = torch::stable::new_empty(in.scores, {in.rows, in.neurons});
  char* z = static_cast<char*>(out.data_ptr());
  in.for_each_block([&](int64_t first, int64_t last) {
    for (int64_t r = 0; r < in.rows; ++r) {
      kernels().hard_concrete(in.dtype, in.gates, in.scores.data_ptr(), in.sample(r), first, last,
                              z + r * in.row_bytes());
    }
  });
  return out;
}

// The rows are summed in order, so the number of threads does not matter.
static Tensor hard_concrete_backward(Tensor grad_, Tensor scores, Tensor sample_ids, Tensor step,
                                     int64_t seed, int64_t layer, double temperature, double gamma,
                                     double zeta, bool training) {
  const GateInput in(scores, sample_ids, step, seed, layer, temperature, gamma, zeta, training);
  const Tensor grad = torch::stable::contiguous(grad_);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == in.rows && grad.size(1) == in.neurons &&
                      grad.scalar_type() == in.scores.scalar_type(),
                  "grad must have the shape and dtype of the gates");
  Tensor grad_scores = torch::stable::new_zeros(in.scores, {in.neurons});
  const char* g = static_cast<const char*>(grad.data_ptr());
  in.for_each_block([&](int64_t first, int64_t last) {
    for (int64_t r = 0; r < in.rows; ++r) {
      kernels().hard_concrete_backward(in.dtype, in.gates, g + r * in.row_bytes(), in.scores.data_ptr(),
                                       in.sample(r), first, last, grad_scores.data_ptr());
    }
  });
  return grad_scores;
}

STABLE_TORCH_LIBRARY_IMPL(neumuter, CPU, m) {
  m.impl("hard_concrete", TORCH_BOX(&hard_concrete));
  m.impl("hard_concrete_backward", TORCH_BOX(&hard_concrete_backward));
}

}  // namespace neumuter::cpu
