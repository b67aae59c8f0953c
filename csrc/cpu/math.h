// Activations and their slopes, on a register of floats or on a double.
// Included like vector.h.
#pragma once

#include <cmath>

#include "../activations.h"
#include "vector.h"

namespace neumuter::cpu {
namespace NEUMUTER_CAPABILITY {

template <typename C>
NEUMUTER_INLINE C horner(C, Scalar<C> c) {
  return splat<C>(c);
}
// c + x·(rest): the coefficients from the constant term upwards.
template <typename C, typename... Rest>
NEUMUTER_INLINE C horner(C x, Scalar<C> c, Rest... rest) {
  return c + x * horner<C>(x, rest...);
}

// The larger, or the smaller, of the limit and x; NaN stays NaN. All of these instructions give the second
// operand where one is NaN; GCC makes two of the general case.
#if defined(__AVX512F__)
NEUMUTER_INLINE Floats at_least(float limit, Floats x) {
  return bits<Floats>(_mm512_max_ps(_mm512_set1_ps(limit), bits<__m512>(x)));
}
#elif defined(__AVX2__)
NEUMUTER_INLINE Floats at_least(float limit, Floats x) {
  return bits<Floats>(_mm256_max_ps(_mm256_set1_ps(limit), bits<__m256>(x)));
}
NEUMUTER_INLINE Floats at_most(float limit, Floats x) {
  return bits<Floats>(_mm256_min_ps(_mm256_set1_ps(limit), bits<__m256>(x)));
}
#else
NEUMUTER_INLINE Floats at_least(float limit, Floats x) { return x < limit ? splat<Floats>(limit) : x; }
NEUMUTER_INLINE Floats at_most(float limit, Floats x) { return x > limit ? splat<Floats>(limit) : x; }
#endif

// 1/x for normal x, within 1 ulp.
NEUMUTER_INLINE Floats reciprocal(Floats x) {
#if defined(__AVX512F__)
  // A Newton step on the 14-bit estimate: the divider would be the slowest part of every activation.
  const Floats estimate = bits<Floats>(_mm512_rcp14_ps(bits<__m512>(x)));
  return estimate + estimate * (1.0f - x * estimate);
#else
  return 1.0f / x;
#endif
}
NEUMUTER_INLINE double reciprocal(double x) { return 1.0 / x; }

// An integer n near x/ln 2 is in the low bits of *rounded, plus `bias`. Returns scale·exp(x − n·ln 2).
template <int kBias>
NEUMUTER_INLINE Floats fraction(Floats x, float scale, Floats* rounded, Floats* n) {
  constexpr float kShift = 12582912.0f + kBias;
  *rounded = x * 1.44269504f + kShift;
  *n = *rounded - kShift;
  const Floats r = (x - *n * 0.693359375f) - *n * -2.12194440e-4f;
  // A minimax fit of ours, error 3.1e-9.
  return horner<Floats>(r, scale, scale, scale * 0.49999994f, scale * 0.16666521f, scale * 0.041668255f,
                        scale * 0.0083686626f, scale * 0.0013821459f);
}

// exp(x) for x <= 0, within 1 ulp (1.2 without fused multiply-add); underflow goes through the denormals
// to 0.
NEUMUTER_INLINE Floats exponential(Floats x) {
  Floats rounded, n;
  const Floats y = fraction<127 + 64>(at_least(-104.0f, x), 1.0f, &rounded, &n);
#if defined(__AVX512F__)
  return bits<Floats>(_mm512_scalef_ps(bits<__m512>(y), bits<__m512>(n)));
#else
  return y * bits<Floats>(bits<Ints>(rounded) << 23) * 0x1p-64f;  // 2^n may not be normal where y·2^n is
#endif
}
NEUMUTER_INLINE double exponential(double x) { return std::exp(x); }

NEUMUTER_INLINE Floats absolute(Floats x) { return bits<Floats>(bits<Ints>(x) & 0x7FFFFFFF); }
NEUMUTER_INLINE double absolute(double x) { return std::fabs(x); }

// σ(x); *complement is 1 − σ(x), without the cancellation.
NEUMUTER_INLINE Floats sigmoid(Floats x, Floats* complement) {
#if defined(__AVX512F__)
  const Floats e = exponential(bits<Floats>(bits<Ints>(x) | INT32_MIN));  // of −|x|
  const Floats larger = reciprocal(1.0f + e), smaller = e * larger;
  *complement = bits<Ints>(x) < 0 ? larger : smaller;
  return bits<Ints>(x) < 0 ? smaller : larger;
#else
  // exp(−x) as it is, since blends and the powers below 2^-126 cost more here. It becomes 0 at the lower
  // limit, where 2^(n − 1) has no exponent left, and infinite at the upper one.
  Floats rounded, n;
  const Floats y = fraction<126>(at_most(89.0f, at_least(-87.3f, -x)), 2.0f, &rounded, &n);
  const Floats e = y * bits<Floats>(bits<Ints>(rounded) << 23);
  const Floats s = reciprocal(1.0f + e);
  *complement = at_most(3e38f, e) * s;
  return s;
#endif
}
NEUMUTER_INLINE double sigmoid(double x, double* complement) {
  const double e = std::exp(-std::fabs(x)), larger = 1.0 / (1.0 + e), smaller = e * larger;
  *complement = x < 0.0 ? larger : smaller;
  return x < 0.0 ? smaller : larger;
}

// Φ(x) of the standard normal distribution, given e = exp(−x²/2).
NEUMUTER_INLINE Floats normal_cdf(Floats x, Floats e) {
  Floats y = absolute(x) * 0.70710678f;
  y = y > 30.0f ? splat<Floats>(30.0f) : y;  // far in the tail, and finite for the reciprocal
  // erf(y)/y in y² for y < 1 and erfc(y)·exp(y²)/t in t = 1/(1 + y/2) above: minimax fits of ours,
  // errors 1.2e-9 and 1.5e-8.
  const Floats small = 0.5f * y *
                       horner<Floats>(y * y, 1.1283791065216064f, -0.3761262595653534f, 0.11283600330352783f,
                                      -0.026854444295167923f, 0.005189535208046436f, -0.0008020841050893068f,
                                      7.889119297033176e-05f);
  const Floats t = reciprocal(1.0f + 0.5f * y);
  const Floats tail =
      0.5f * e * t *
      horner<Floats>(t, 0.2821086049079895f, 0.2818179130554199f, 0.24893543124198914f, 0.16945873200893402f,
                     0.0863637700676918f, 0.042644474655389786f, -0.19275647401809692f, 0.08179587125778198f);
  const Floats upper = y < 1.0f ? 0.5f - small : tail;
  return x < 0.0f ? upper : 1.0f - upper;
}
NEUMUTER_INLINE double normal_cdf(double x, double) { return 0.5 * std::erfc(-x * M_SQRT1_2); }

// φ(x); the slope φ'(x) goes to *slope.
template <Activation A, typename C>
NEUMUTER_INLINE C activation(C x, C* slope) {
  using S = Scalar<C>;
  const S one = 1, zero = 0;
  if constexpr (A == Activation::kSilu) {
    C complement;
    const C s = sigmoid(x, &complement);
    *slope = s * (one + x * complement);
    return x * s;
  } else if constexpr (A == Activation::kGelu) {
    const C e = exponential(S(-0.5) * x * x);
    const C cdf = normal_cdf(x, e);
    *slope = cdf + x * e * S(0.3989422804014327);
    return x * cdf;
  } else if constexpr (A == Activation::kGeluTanh) {
    // ½(1 + tanh v) = σ(2v), without the cancellation.
    const S k = S(1.5957691216057308), c = S(0.044715);  // 2·√(2/π)
    C complement;
    const C s = sigmoid(k * (x + c * x * x * x), &complement);
    *slope = s + x * (s * complement) * (k * (one + S(3) * c * x * x));
    return x * s;
  } else if constexpr (A == Activation::kRelu) {
    *slope = x <= zero ? splat<C>(zero) : splat<C>(one);  // as PyTorch, also for NaN
    return x < zero ? splat<C>(zero) : x;                 // NaN stays NaN
  } else if constexpr (A == Activation::kRelu2) {
    const C r = x < zero ? splat<C>(zero) : x;
    *slope = S(2) * r;
    return r * r;
  } else {
    *slope = splat<C>(one);
    return x;
  }
}

}  // namespace NEUMUTER_CAPABILITY
}  // namespace neumuter::cpu
