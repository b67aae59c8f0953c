// hard_concrete and its backward on the CPU.
#include <algorithm>

#include "../tensors.h"
#include "kernels.h"

namespace neumuter::cpu {

constexpr int64_t kNeurons = 4096;  // per block

struct GateInput {
  Dtype dtype;
  Tensor scores, ids;
  int64_t layers, rows, neurons;
  Gates gates;

  GateInput(const Tensor& scores_, const Tensor& sample_ids, const Tensor& step, int64_t seed, int64_t layer,
            double temperature, double gamma, double zeta, bool training)
      : scores(torch::stable::contiguous(scores_)), ids(torch::stable::contiguous(sample_ids)) {
    STD_TORCH_CHECK(scores.dim() == 1 || scores.dim() == 2, "scores must have shape [F] or [L, F]");
    STD_TORCH_CHECK(ids.dim() == 1 && ids.scalar_type() == ScalarType::Long,
                    "sample_ids must be int64 [rows]");
    STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Float || scores.scalar_type() == ScalarType::Double,
                    "scores must be float32 or float64");
    STD_TORCH_CHECK(step.numel() == 1 && step.scalar_type() == ScalarType::Long, "step must be one int64");
    dtype = scores.scalar_type() == ScalarType::Double ? Dtype::kDouble : Dtype::kFloat;
    rows = ids.numel();
    layers = scores.dim() == 2 ? scores.size(0) : 1;
    neurons = scores.size(-1);
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

  // f(layer, its gates, first, last) for each block of neurons of each layer, in parallel.
  template <typename F>
  void for_each_block(F f) const {
    torch::stable::parallel_for(0, layers * blocks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t l = i / blocks(), b = i % blocks();
        Gates own = gates;
        own.layer += static_cast<uint32_t>(l);
        f(l, own, b * kNeurons, std::min((b + 1) * kNeurons, neurons));
      }
    });
  }
};

static Tensor hard_concrete(Tensor scores, Tensor sample_ids, Tensor step, int64_t seed, int64_t layer,
                            double temperature, double gamma, double zeta, bool training) {
  const GateInput in(scores, sample_ids, step, seed, layer, temperature, gamma, zeta, training);
  Tensor out = in.scores.dim() == 2 ? torch::stable::new_empty(in.scores, {in.layers, in.rows, in.neurons})
                                    : torch::stable::new_empty(in.scores, {in.rows, in.neurons});
  const char* s = static_cast<const char*>(in.scores.data_ptr());
  char* z = static_cast<char*>(out.data_ptr());
  in.for_each_block([&](int64_t l, const Gates& gates, int64_t first, int64_t last) {
    for (int64_t r = 0; r < in.rows; ++r) {
      kernels().hard_concrete(in.dtype, gates, s + l * in.row_bytes(), in.sample(r), first, last,
                              z + (l * in.rows + r) * in.row_bytes());
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
  STD_TORCH_CHECK(grad.dim() == in.scores.dim() + 1 && grad.numel() == in.layers * in.rows * in.neurons &&
                      grad.size(-1) == in.neurons && grad.size(-2) == in.rows &&
                      grad.scalar_type() == in.scores.scalar_type(),
                  "grad must have the shape and dtype of the gates");
  Tensor grad_scores = in.scores.dim() == 2 ? torch::stable::new_zeros(in.scores, {in.layers, in.neurons})
                                            : torch::stable::new_zeros(in.scores, {in.neurons});
  const char* g = static_cast<const char*>(grad.data_ptr());
  const char* s = static_cast<const char*>(in.scores.data_ptr());
  char* out = static_cast<char*>(grad_scores.data_ptr());
  in.for_each_block([&](int64_t l, const Gates& gates, int64_t first, int64_t last) {
    for (int64_t r = 0; r < in.rows; ++r) {
      kernels().hard_concrete_backward(in.dtype, gates, g + (l * in.rows + r) * in.row_bytes(),
                                       s + l * in.row_bytes(), in.sample(r), first, last,
                                       out + l * in.row_bytes());
    }
  });
  return grad_scores;
}

STABLE_TORCH_LIBRARY_IMPL(neumuter, CPU, m) {
  m.impl("hard_concrete", TORCH_BOX(&hard_concrete));
  m.impl("hard_concrete_backward", TORCH_BOX(&hard_concrete_backward));
}

}  // namespace neumuter::cpu
