// Tiles: short runs of one row, widened to the compute type on the stack, so that the arithmetic
// is one plain loop for every dtype. Included like math.h.
#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "math.h"

namespace neumuter::cpu {
namespace NEUMUTER_CAPABILITY {

constexpr int kTile = 256;

struct BFloat16 {
  uint16_t x;
};
struct Half {
  uint16_t x;
};

template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

static inline float widen(float x) { return x; }
static inline double widen(double x) { return x; }
static inline float widen(BFloat16 x) { return bits<float>(static_cast<uint32_t>(x.x) << 16); }
static inline float widen(Half h) {
  const uint32_t sign = static_cast<uint32_t>(h.x & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h.x & 0x7FFF) << 13;
  const float finite = bits<float>(magnitude) * 0x1p112f;
  const uint32_t special = (h.x & 0x7C00) == 0x7C00 ? magnitude | 0x7F800000u : bits<uint32_t>(finite);
  return bits<float>(sign | special);
}

static inline void narrow(float x, float* to) { *to = x; }
static inline void narrow(double x, double* to) { *to = x; }
static inline void narrow(float x, BFloat16* to) {
  const uint32_t u = bits<uint32_t>(x);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  to->x = static_cast<uint16_t>(x != x ? 0x7FC0u : rounded);
}
static inline void narrow(float x, Half* to) {
  const uint32_t u = bits<uint32_t>(x);
  const uint32_t magnitude = u & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 aligns a subnormal result with the last bits of a float, rounding it on the way.
  const uint32_t tiny = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3F000000u;
  uint32_t h = magnitude < 0x38800000u ? tiny : normal;
  h = magnitude >= 0x477FF000u ? 0x7C00u : h;  // 65520 and above round to inf
  h = magnitude > 0x7F800000u ? 0x7E00u : h;
  to->x = static_cast<uint16_t>(h | ((u >> 16) & 0x8000u));
}

// The run as compute type: the memory itself where it already is that, else a copy in `buffer`.
template <typename T, typename C>
static inline const C* load(const T* __restrict from, int64_t stride, C* __restrict buffer, int n) {
  if (stride == 1) {
    if constexpr (sizeof(T) == sizeof(C)) {
      return from;
    } else {
      int i = 0;
#if defined(__F16C__)
      if constexpr (std::is_same_v<T, Half>) {
        for (; i + 8 <= n; i += 8) {
          const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
          _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(h));
        }
      }
#endif
      for (; i < n; ++i) buffer[i] = widen(from[i]);
    }
  } else {
    for (int i = 0; i < n; ++i) buffer[i] = widen(from[2 * i]);
  }
  return buffer;
}

template <typename C, typename T>
static inline void store(const C* __restrict from, T* __restrict to, int64_t stride, int n) {
  if (stride == 1) {
    int i = 0;
#if defined(__F16C__)
    if constexpr (std::is_same_v<T, Half>) {
      for (; i + 8 <= n; i += 8) {
        const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), h);
      }
    }
#endif
    for (; i < n; ++i) narrow(from[i], to + i);
  } else {
    for (int i = 0; i < n; ++i) narrow(from[i], to + 2 * i);
  }
}

// Rounds the run to T, in place.
template <typename T, typename C>
static inline void round_to(C* __restrict x, int n) {
  if constexpr (sizeof(T) != sizeof(C)) {
    T narrowed[kTile];
    store(x, narrowed, 1, n);
    load(narrowed, 1, x, n);
  }
}

}  // namespace NEUMUTER_CAPABILITY
}  // namespace neumuter::cpu
