#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

#include "kernels.h"

namespace neumuter::cpu {

#define NEUMUTER_DECLARE(capability)               \
  namespace capability {                           \
  extern const Kernels kernels_of_this_capability; \
  }
NEUMUTER_DECLARE(baseline)
#if defined(__x86_64__)
NEUMUTER_DECLARE(avx2)
NEUMUTER_DECLARE(avx512)
#endif

static const Kernels& choose() {
  const Kernels* supported[3] = {&baseline::kernels_of_this_capability};
  int count = 1;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    supported[count++] = &avx2::kernels_of_this_capability;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      supported[count++] = &avx512::kernels_of_this_capability;
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
