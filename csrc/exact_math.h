// Float32 functions that give the same bits on every backend.
//
// Each line is one IEEE operation in the order of neumuter_kernels/reference.py. Files that include
// this are compiled without contraction (-ffp-contract=off, --fmad=false).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define NEUMUTER_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define NEUMUTER_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace neumuter {

template <typename To, typename From>
NEUMUTER_HOST_DEVICE To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// exp of x clamped to ±87, within 2 ulp.
NEUMUTER_HOST_DEVICE float exact_exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 87.0f ? 87.0f : x;
  const float rounded = x * 1.44269504f + 12582912.0f;  // the low bits now hold the integer
  const float n = rounded - 12582912.0f;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float q = 0.00019919360056519508f;
  q = q * r + 0.0013947212137281895f;
  q = q * r + 0.008333262987434864f;
  q = q * r + 0.04166625440120697f;
  q = q * r + 0.1666666716337204f;
  q = q * r + 0.5f;
  const float y = ((r * r) * q + r) + 1.0f;
  const int32_t exponent = bit_copy<int32_t>(rounded) - 0x4B400000 + 127;
  return y * bit_copy<float>(exponent << 23);
}

// log of a normal positive x, within 2 ulp.
NEUMUTER_HOST_DEVICE float exact_log(float x) {
  const int32_t bits = bit_copy<int32_t>(x);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;  // 0x3F3504F3 is √½
  const float t = bit_copy<float>(bits - exponent * (1 << 23)) - 1.0f;
  const float e = static_cast<float>(exponent);
  const float z = t * t;
  float p = 0.06915368139743805f;
  p = p * t + -0.11789807677268982f;
  p = p * t + 0.11872976273298264f;
  p = p * t + -0.1238434836268425f;
  p = p * t + 0.14218658208847046f;
  p = p * t + -0.16669251024723053f;
  p = p * t + 0.20002226531505585f;
  p = p * t + -0.24999986588954926f;
  p = p * t + 0.3333331048488617f;
  float y = (t * z) * p;
  y = (y + e * -2.12194440e-4f) - 0.5f * z;
  return (t + y) + e * 0.693359375f;
}

NEUMUTER_HOST_DEVICE float exact_sigmoid(float x) { return 1.0f / (1.0f + exact_exp(-x)); }

NEUMUTER_HOST_DEVICE float clamp_unit(float x) {
  x = x < 0.0f ? 0.0f : x;
  return x > 1.0f ? 1.0f : x;
}

// The hard-concrete gate without noise: clamp(σ(s)·(ζ − γ) + γ, 0, 1).
NEUMUTER_HOST_DEVICE float evaluation_gate(float score, float gamma, float zeta) {
  return clamp_unit(exact_sigmoid(score) * (zeta - gamma) + gamma);
}

}  // namespace neumuter
