// One register of float32 lanes in the compiler's vector extensions, and how each dtype gets in and out.
// Included by files that are compiled once per instruction set, inside their own namespace.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace neumuter::cpu {
namespace NEUMUTER_CAPABILITY {

#define NEUMUTER_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfWords __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
  uint16_t x;
};
struct Half {
  uint16_t x;
};

// What T is computed in: a register of floats, or one double (which only gradient checks use).
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, Floats>;
template <typename C>
using Scalar = std::conditional_t<std::is_same_v<C, double>, double, float>;
template <typename T>
constexpr int kWidth = std::is_same_v<T, double> ? 1 : kLanes;

template <typename To, typename From>
NEUMUTER_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename C>
NEUMUTER_INLINE C splat(Scalar<C> x) {
  return x - C{};  // x − 0 keeps the sign of a zero, 0 + x would not
}

template <typename V>
NEUMUTER_INLINE V load_raw(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

NEUMUTER_INLINE Floats load(const float* from) { return load_raw<Floats>(from); }
NEUMUTER_INLINE double load(const double* from) { return *from; }

NEUMUTER_INLINE void store(Floats x, float* to) { std::memcpy(to, &x, sizeof(x)); }
NEUMUTER_INLINE void store(double x, double* to) { *to = x; }

NEUMUTER_INLINE Words widen(HalfWords h) {
#if defined(__AVX512F__)
  return bits<Words>(_mm512_cvtepu16_epi32(bits<__m256i>(h)));  // GCC makes five instructions of the below
#elif defined(__AVX2__)
  return bits<Words>(_mm256_cvtepu16_epi32(bits<__m128i>(h)));
#else
  return __builtin_convertvector(h, Words);
#endif
}
NEUMUTER_INLINE Floats from_bfloat16(HalfWords h) { return bits<Floats>(widen(h) << 16); }
// The nearest bfloat16, ties to even: as it is stored, and widened again.
#if defined(__AVX512BF16__)
NEUMUTER_INLINE HalfWords to_bfloat16(Floats x) {  // takes float32 denormals for zeros
  return bits<HalfWords>(_mm512_cvtneps_pbh(bits<__m512>(x)));
}
NEUMUTER_INLINE Floats round_to_bfloat16(Floats x) { return from_bfloat16(to_bfloat16(x)); }
#else
NEUMUTER_INLINE Words upper_half(Floats x) {
  const Words u = bits<Words>(x);
  return (u + (((u >> 16) & 1u) + 0x7FFFu)) | bits<Words>(x != x);  // of NaN: all bits
}
NEUMUTER_INLINE HalfWords to_bfloat16(Floats x) {
  const Words h = upper_half(x) >> 16;
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i w = bits<__m256i>(h);  // GCC makes five instructions of the below
  return bits<HalfWords>(_mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
#else
  return __builtin_convertvector(h, HalfWords);
#endif
}
NEUMUTER_INLINE Floats round_to_bfloat16(Floats x) { return bits<Floats>(upper_half(x) & 0xFFFF0000u); }
#endif
NEUMUTER_INLINE Floats load(const BFloat16* from) { return from_bfloat16(load_raw<HalfWords>(from)); }
NEUMUTER_INLINE void store(Floats x, BFloat16* to) {
  const HalfWords h = to_bfloat16(x);
  std::memcpy(to, &h, sizeof(h));
}

#if defined(__AVX512F__)
NEUMUTER_INLINE Floats from_half(HalfWords h) { return bits<Floats>(_mm512_cvtph_ps(bits<__m256i>(h))); }
NEUMUTER_INLINE HalfWords to_half(Floats x) {
  return bits<HalfWords>(_mm512_cvtps_ph(bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
NEUMUTER_INLINE Floats from_half(HalfWords h) { return bits<Floats>(_mm256_cvtph_ps(bits<__m128i>(h))); }
NEUMUTER_INLINE HalfWords to_half(Floats x) {
  return bits<HalfWords>(_mm256_cvtps_ph(bits<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
}
#else
NEUMUTER_INLINE Floats from_half(HalfWords h) {
  const Words u = __builtin_convertvector(h, Words);
  const Words magnitude = (u & 0x7FFFu) << 13;
  const Words finite = bits<Words>(bits<Floats>(magnitude) * 0x1p112f);
  const Words special = (u & 0x7C00u) == 0x7C00u ? magnitude | 0x7F800000u : finite;
  return bits<Floats>((u & 0x8000u) << 16 | special);
}
NEUMUTER_INLINE HalfWords to_half(Floats x) {
  const Words u = bits<Words>(x);
  const Words magnitude = u & 0x7FFFFFFFu;
  // Adding 0.5 aligns a subnormal result with the last bits of a float, rounding it on the way.
  const Words tiny = bits<Words>(bits<Floats>(magnitude) + 0.5f) - 0x3F000000u;
  Words h = (magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1u)) >> 13;
  h = magnitude < 0x38800000u ? tiny : h;
  h = magnitude >= 0x477FF000u ? Words{} + 0x7C00u : h;  // 65520 and above round to inf
  h = magnitude > 0x7F800000u ? Words{} + 0x7E00u : h;
  return __builtin_convertvector(h | ((u >> 16) & 0x8000u), HalfWords);
}
#endif
NEUMUTER_INLINE Floats load(const Half* from) { return from_half(load_raw<HalfWords>(from)); }
NEUMUTER_INLINE void store(Floats x, Half* to) {
  const HalfWords h = to_half(x);
  std::memcpy(to, &h, sizeof(h));
}

// Stores past the caches: for outputs that leave the caches before they are read again. This saves
// reading their lines first. `to` must be aligned to the size that is written; end with stream_fence.
template <typename C, typename T>
NEUMUTER_INLINE void stream(C x, T* to) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<C, Floats>) {
    alignas(sizeof(C)) T narrow[kLanes];
    store(x, narrow);
    constexpr int kBytes = sizeof(narrow);
    if constexpr (kBytes == 8) {
      _mm_stream_si64(reinterpret_cast<long long*>(to), load_raw<long long>(narrow));
    } else if constexpr (kBytes == 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to), load_raw<__m128i>(narrow));
#if defined(__AVX2__)
    } else if constexpr (kBytes == 32) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), load_raw<__m256i>(narrow));
#endif
#if defined(__AVX512F__)
    } else if constexpr (kBytes == 64) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), load_raw<__m512i>(narrow));
#endif
    }
    return;
  }
#endif
  store(x, to);
}
NEUMUTER_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// x as it is after a trip through T.
template <typename T, typename C>
NEUMUTER_INLINE C round_to(C x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return round_to_bfloat16(x);
  } else if constexpr (std::is_same_v<T, Half>) {
    return from_half(to_half(x));
  } else {
    return x;
  }
}

}  // namespace NEUMUTER_CAPABILITY
}  // namespace neumuter::cpu
