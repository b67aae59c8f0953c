// The vectorised kernels. Each is compiled once per instruction set (see CMakeLists.txt) and works
// on one block, so that the parallel loops around it are the same code on every machine.
#pragma once

#include <cstdint>

#include "../activations.h"

namespace neumuter::cpu {

enum class Dtype : int { kFloat, kDouble, kBFloat16, kHalf };

// The activations of a masked FFN. `up` is null, and its stride 0, for a plain FFN. Strides count elements;
// columns are `column_stride` apart (2 when gate and up are interleaved). `mask` is float, or double for
// kDouble. `mask_rows[t]` is the mask row of token t, or -1 for an unmasked token.
struct Ffn {
  Dtype dtype;
  Activation activation;
  const void* gate;
  const void* up;
  int64_t gate_stride, up_stride, column_stride;
  const void* mask;
  int64_t mask_stride;
  const int64_t* mask_rows;
  bool stream;  // write outputs past the caches
};

// A block of tokens (through `order` where it is not null), with all of their columns.
struct Block {
  const int64_t* order;
  int64_t first_token, last_token;
  int64_t columns;
};

struct FfnGrad {
  const void* grad;
  int64_t grad_stride;
  void* grad_gate;  // with the strides below; null when not wanted
  void* grad_up;
  int64_t grad_gate_stride, grad_up_stride, grad_column_stride;
};

struct Gates {
  uint64_t seed;
  uint32_t step, layer;
  double temperature, gamma, zeta;
  bool training;
};

// One set of functions per instruction set, in a namespace of its own.
#define NEUMUTER_DECLARE_KERNELS(capability)                                                                \
  namespace capability {                                                                                    \
  void masked_ffn(const Ffn&, const Block&, void* out, int64_t out_stride);                                 \
  void masked_ffn_backward(const Ffn&, const FfnGrad&, const Block&, void* grad_mask);                      \
  void hard_concrete(Dtype, const Gates&, const void* scores, uint32_t sample, int64_t first, int64_t last, \
                     void* out);                                                                            \
  void hard_concrete_backward(Dtype, const Gates&, const void* grad, const void* scores, uint32_t sample,   \
                              int64_t first, int64_t last, void* grad_scores);                              \
  int32_t collect_below(const float* scores, int32_t n, float cut, bool inclusive, int32_t* positions);     \
  void evaluation_gates(float* scores, int64_t n, float gamma, float zeta);                                 \
  void cross_entropy(Dtype, void* logits, int64_t n, int64_t target, void* loss);                           \
  void kl_divergence(Dtype, void* logits, const void* reference, int64_t n, void* loss);                    \
  }

NEUMUTER_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
NEUMUTER_DECLARE_KERNELS(avx2)
NEUMUTER_DECLARE_KERNELS(avx512)
NEUMUTER_DECLARE_KERNELS(avx512_bf16)
#endif

struct Kernels {
  const char* name;
  decltype(&baseline::masked_ffn) masked_ffn;
  // Adds the mask's gradient over the block's tokens to grad_mask[0 .. columns), unless null.
  decltype(&baseline::masked_ffn_backward) masked_ffn_backward;
  // Neurons [first, last) of one row of gates; `first` is a multiple of 4.
  decltype(&baseline::hard_concrete) hard_concrete;
  // Adds the scores' gradient from one row of gates.
  decltype(&baseline::hard_concrete_backward) hard_concrete_backward;
  // The positions of scores below the cut (or at it, if inclusive; never NaN), ascending; how many.
  // `positions` has room for n.
  decltype(&baseline::collect_below) collect_below;
  // Replaces scores by their evaluation gates.
  decltype(&baseline::evaluation_gates) evaluation_gates;
  // One token: its loss (double for kDouble, else float), whose gradient replaces its n logits.
  decltype(&baseline::cross_entropy) cross_entropy;
  decltype(&baseline::kl_divergence) kl_divergence;
};

// The widest instruction set that this CPU has, or the one that NEUMUTER_CPU_CAPABILITY names.
const Kernels& kernels();

}  // namespace neumuter::cpu
