#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

#include "kernels.h"

namespace neumuter::cpu {

#define NEUMUTER_KERNELS(capability)   \
  {#capability,                        \
   capability::masked_ffn,             \
   capability::masked_ffn_backward,    \
   capability::hard_concrete,          \
   capability::hard_concrete_backward, \
   capability::collect_below,          \
   capability::evaluation_gates,       \
   capability::cross_entropy,          \
   capability::kl_divergence}

static const Kernels baseline_kernels = NEUMUTER_KERNELS(baseline);
#if defined(__x86_64__)
static const Kernels avx2_kernels = NEUMUTER_KERNELS(avx2);
static const Kernels avx512_kernels = NEUMUTER_KERNELS(avx512);
static const Kernels avx512_bf16_kernels = NEUMUTER_KERNELS(avx512_bf16);
#endif

static const Kernels& choose() {
  const Kernels* supported[4] = {&baseline_kernels};
  int count = 1;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    supported[count++] = &avx2_kernels;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      supported[count++] = &avx512_kernels;
      if (__builtin_cpu_supports("avx512bf16")) supported[count++] = &avx512_bf16_kernels;
    }
  }
#endif
  const char* wanted = std::getenv("NEUMUTER_CPU_CAPABILITY");
  if (wanted == nullptr) return *supported[count - 1];
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (std::string(wanted) == supported[i]->name) return *supported[i];
    names += std::string(i ? ", " : "") + supported[i]->name;
  }
  STD_TORCH_CHECK(false, "NEUMUTER_CPU_CAPABILITY is '", wanted, "'; this CPU supports: ", names);
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace neumuter::cpu
