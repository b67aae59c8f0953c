// Hard-concrete gates, for a run of neurons of one row. Compiled without contraction, so that
// every instruction set and every device gives the same bits (see exact_math.h).
#include <cmath>

#include "../exact_math.h"
#include "../philox.h"
#include "kernels.h"

namespace neumuter::cpu {
namespace NEUMUTER_CAPABILITY {

static inline float log_of(float x) { return exact_log(x); }
static inline double log_of(double x) { return std::log(x); }
static inline float sigmoid_of(float x) { return exact_sigmoid(x); }
static inline double sigmoid_of(double x) { return 1.0 / (1.0 + std::exp(-x)); }

constexpr int kLanes = 64;  // Philox counters at a time
constexpr int kRun = 4 * kLanes;

// logit(ν) of neurons [first, first + kRun).
template <typename C>
static inline void noise(const Gates& gates, uint32_t sample, int64_t first, C* __restrict out) {
  uint32_t words[4][kLanes];
  for (int i = 0; i < kLanes; ++i) {
    words[0][i] = static_cast<uint32_t>(first / 4) + i;
    words[1][i] = sample;
    words[2][i] = gates.layer;
    words[3][i] = gates.step;
  }
  philox_4x32(words, gates.seed);
  const C margin = C(1e-4), width = C(1.0 - 2e-4);
  for (int w = 0; w < 4; ++w) {
    for (int i = 0; i < kLanes; ++i) {
      const C u = (static_cast<C>(static_cast<int32_t>(words[w][i] >> 9)) + C(0.5)) * C(0x1p-23);
      out[4 * i + w] = log_of(u * width + margin) - log_of((C(1) - u) * width + margin);
    }
  }
}

// σ of neurons [first, first + n).
template <typename C>
static inline void sigma_run(const Gates& gates, const C* __restrict scores, uint32_t sample, int64_t first,
                             int n, C* __restrict sigma) {
  if (gates.training) {
    noise(gates, sample, first, sigma);
    const C inverse = C(1.0 / gates.temperature);
    for (int i = 0; i < n; ++i) sigma[i] = sigmoid_of((sigma[i] + scores[first + i]) * inverse);
  } else {
    for (int i = 0; i < n; ++i) sigma[i] = sigmoid_of(scores[first + i]);
  }
}

template <typename C>
static void forward(const Gates& gates, const C* scores, uint32_t sample, int64_t first, int64_t last,
                    C* __restrict out) {
  const C gamma = C(gates.gamma), span = C(gates.zeta) - C(gates.gamma);
  for (; first < last; first += kRun) {
    alignas(64) C sigma[kRun];
    const int n = static_cast<int>(last - first < kRun ? last - first : kRun);
    sigma_run(gates, scores, sample, first, n, sigma);
    for (int i = 0; i < n; ++i) {
      const C raw = sigma[i] * span + gamma;
      const C positive = raw < C(0) ? C(0) : raw;
      out[first + i] = positive > C(1) ? C(1) : positive;
    }
  }
}

template <typename C>
static void backward(const Gates& gates, const C* grad, const C* scores, uint32_t sample, int64_t first,
                     int64_t last, C* __restrict grad_scores) {
  const C gamma = C(gates.gamma), span = C(gates.zeta) - C(gates.gamma);
  const C scale = span * (gates.training ? C(1.0 / gates.temperature) : C(1));
  for (; first < last; first += kRun) {
    alignas(64) C sigma[kRun];
    const int n = static_cast<int>(last - first < kRun ? last - first : kRun);
    sigma_run(gates, scores, sample, first, n, sigma);
    for (int i = 0; i < n; ++i) {
      const C raw = sigma[i] * span + gamma;
      const C slope = (sigma[i] * (C(1) - sigma[i])) * scale;
      const C g = grad[first + i] * slope;
      grad_scores[first + i] += (raw > C(0)) & (raw < C(1)) ? g : C(0);
    }
  }
}

void hard_concrete(Dtype dtype, const Gates& gates, const void* scores, uint32_t sample, int64_t first,
                   int64_t last, void* out) {
  if (dtype == Dtype::kDouble) {
    forward(gates, static_cast<const double*>(scores), sample, first, last, static_cast<double*>(out));
  } else {
    forward(gates, static_cast<const float*>(scores), sample, first, last, static_cast<float*>(out));
  }
}

void hard_concrete_backward(Dtype dtype, const Gates& gates, const void* grad, const void* scores,
                            uint32_t sample, int64_t first, int64_t last, void* grad_scores) {
  if (dtype == Dtype::kDouble) {
    backward(gates, static_cast<const double*>(grad), static_cast<const double*>(scores), sample, first, last,
             static_cast<double*>(grad_scores));
  } else {
    backward(gates, static_cast<const float*>(grad), static_cast<const float*>(scores), sample, first, last,
             static_cast<float*>(grad_scores));
  }
}

}  // namespace NEUMUTER_CAPABILITY
}  // namespace neumuter::cpu
