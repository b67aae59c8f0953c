// cross_entropy_ and kl_divergence_ on the CPU: the losses of tokens, and their gradients over their logits.
#include <algorithm>

#include "dtypes.h"

namespace neumuter::cpu {

constexpr int64_t kGrain = 1 << 13;  // logits that are worth a thread

struct Logits {
  Tensor tensor;
  Dtype dtype;
  int64_t tokens, vocabulary;

  explicit Logits(const Tensor& x) : tensor(x), dtype(dtype_of(x.scalar_type())) {
    STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "logits must be contiguous [N, V]");
    tokens = x.size(0);
    vocabulary = x.size(1);
    STD_TORCH_CHECK(tokens == 0 || vocabulary > 0, "logits must have at least one column");
  }

  void* row(const Tensor& of, int64_t t) const {
    return static_cast<char*>(of.data_ptr()) + t * vocabulary * static_cast<int64_t>(of.element_size());
  }

  // f(token, place of its loss) for each token, in parallel; returns the losses.
  template <typename F>
  Tensor losses(F f) const {
    const auto type = dtype == Dtype::kDouble ? ScalarType::Double : ScalarType::Float;
    Tensor out = torch::stable::new_empty(tensor, {tokens}, type);
    char* to = static_cast<char*>(out.data_ptr());
    const int64_t size = static_cast<int64_t>(out.element_size());
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(vocabulary, 1));
    torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) f(t, to + t * size);
    });
    return out;
  }
};

static Tensor cross_entropy_(Tensor logits, Tensor targets_) {
  const Logits in(logits);
  const Tensor targets = torch::stable::contiguous(targets_);
  STD_TORCH_CHECK(
      targets.dim() == 1 && targets.numel() == in.tokens && targets.scalar_type() == ScalarType::Long,
      "targets must be int64 [N]");
  const int64_t* target = static_cast<const int64_t*>(targets.data_ptr());
  for (int64_t t = 0; t < in.tokens; ++t) {
    STD_TORCH_CHECK(target[t] >= 0 && target[t] < in.vocabulary, "targets must lie in [0, ", in.vocabulary,
                    "), got ", target[t]);
  }
  return in.losses([&](int64_t t, void* loss) {
    kernels().cross_entropy(in.dtype, in.row(logits, t), in.vocabulary, target[t], loss);
  });
}

static Tensor kl_divergence_(Tensor logits, Tensor reference_) {
  const Logits in(logits);
  const Tensor reference = torch::stable::contiguous(reference_);
  STD_TORCH_CHECK(reference.dim() == 2 && reference.size(0) == in.tokens &&
                      reference.size(1) == in.vocabulary && reference.scalar_type() == logits.scalar_type(),
                  "reference must have the shape and dtype of logits");
  return in.losses([&](int64_t t, void* loss) {
    kernels().kl_divergence(in.dtype, in.row(logits, t), in.row(reference, t), in.vocabulary, loss);
  });
}

STABLE_TORCH_LIBRARY_IMPL(neumuter, CPU, m) {
  m.impl("cross_entropy_", TORCH_BOX(&cross_entropy_));
  m.impl("kl_divergence_", TORCH_BOX(&kl_divergence_));
}

}  // namespace neumuter::cpu
