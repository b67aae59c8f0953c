// Activations and their slopes, written so that compilers vectorise loops over them.
// Included by files that are compiled once per instruction set, inside their own namespace.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../activations.h"

namespace neumuter::cpu {
namespace NEUMUTER_CAPABILITY {

template <typename To, typename From>
static inline To bits(From from) {
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename C>
static inline C horner(C, C c) {
  return c;
}
// c + x·(rest): the coefficients from the constant term upwards.
template <typename C, typename... Rest>
static inline C horner(C x, C c, Rest... rest) {
  return c + x * horner(x, rest...);
}

// exp(x) within 2 ulp for all x: overflow gives inf, underflow goes through the denormals to 0.
static inline float exponential(float x) {
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float rounded = x * 1.44269504f + 12582912.0f;
  const float n = rounded - 12582912.0f;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  const float q = horner(r, 0.5f, 0.1666666716337204f, 0.04166625440120697f, 0.008333262987434864f,
                         0.0013947212137281895f, 0.00019919360056519508f);
  const float y = 1.0f + (r + (r * r) * q);
  const int32_t exponent = bits<int32_t>(rounded) - 0x4B400000;
  const int32_t half = exponent >> 1;  // 2^n may not be representable where y·2^n is
  return y * bits<float>((half + 127) << 23) * bits<float>((exponent - half + 127) << 23);
}
static inline double exponential(double x) { return std::exp(x); }

template <typename C>
static inline C sigmoid(C x) {
  return C(1) / (C(1) + exponential(-x));
}

// Φ(x) of the standard normal distribution, given e = exp(−x²/2).
static inline float normal_cdf(float x, float e) {
  const float y = std::fabs(x) * 0.70710678f;
  // erf(y)/y in y² for y < 1 and erfc(y)·exp(y²)/t in t = 1/(1 + y/2) above: minimax fits of ours,
  // errors 1.2e-9 and 1.5e-8.
  const float z = y * y;
  const float small =
      0.5f * y *
      horner(z, 1.1283791065216064f, -0.3761262595653534f, 0.11283600330352783f, -0.026854444295167923f,
             0.005189535208046436f, -0.0008020841050893068f, 7.889119297033176e-05f);
  const float t = 1.0f / (1.0f + 0.5f * y);
  const float tail =
      0.5f * e * t *
      horner(t, 0.2821086049079895f, 0.2818179130554199f, 0.24893543124198914f, 0.16945873200893402f,
             0.0863637700676918f, 0.042644474655389786f, -0.19275647401809692f, 0.08179587125778198f);
  const float upper = y < 1.0f ? 0.5f - small : tail;
  return x < 0.0f ? upper : 1.0f - upper;
}
static inline double normal_cdf(double x, double) { return 0.5 * std::erfc(-x * M_SQRT1_2); }

// φ(x); the slope φ'(x) goes to *slope.
template <Activation A, typename C>
static inline C activation(C x, C* slope) {
  if constexpr (A == Activation::kSilu) {
    const C s = sigmoid(x);
    *slope = s * (C(1) + x * (C(1) - s));
    return x * s;
  } else if constexpr (A == Activation::kGelu) {
    const C e = exponential(C(-0.5) * x * x);
    const C cdf = normal_cdf(x, e);
    *slope = cdf + x * e * C(0.3989422804014327);
    return x * cdf;
  } else if constexpr (A == Activation::kGeluTanh) {
    // ½(1 + tanh v) = σ(2v), without the cancellation; likewise 1 − σ.
    const C k = C(1.5957691216057308), c = C(0.044715);  // 2·√(2/π)
    const C e = exponential(-(k * (x + c * x * x * x)));
    const C s = C(1) / (C(1) + e);
    const C complement = x > C(0) ? e * s : C(1) - s;
    *slope = s + x * (s * complement) * (k * (C(1) + C(3) * c * x * x));
    return x * s;
  } else if constexpr (A == Activation::kRelu) {
    *slope = x > C(0) ? C(1) : C(0);
    return x < C(0) ? C(0) : x;  // NaN stays NaN
  } else {
    const C r = x < C(0) ? C(0) : x;
    *slope = C(2) * r;
    return r * r;
  }
}

}  // namespace NEUMUTER_CAPABILITY
}  // namespace neumuter::cpu
