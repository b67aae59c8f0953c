// The losses of one token and their gradients: three passes over its logits, which stay in the L2 cache.
#include <limits>

#include "kernels.h"
#include "math.h"

namespace neumuter::cpu {
namespace NEUMUTER_CAPABILITY {

// Calls body(i, n) for each register of logits [i, end); only the last one may hold fewer than kWidth.
template <typename T, typename Body>
NEUMUTER_INLINE void for_each_register(int64_t i, int64_t end, Body body) {
  for (; i + kWidth<T> <= end; i += kWidth<T>) body(i, kWidth<T>);
  if (i < end) body(i, static_cast<int>(end - i));
}

// Sums of float32 lanes run over this many registers, then go to a double: a vocabulary is too long for one.
constexpr int64_t kSummed = 64;

// Calls body(first, last) for runs of logits whose sums stay accurate.
template <typename T, typename Body>
NEUMUTER_INLINE void for_each_sum(int64_t size, Body body) {
  constexpr int64_t kRun = kSummed * kWidth<T>;
  for (int64_t i = 0; i < size; i += kRun) body(i, i + kRun < size ? i + kRun : size);
}

// n logits; the other lanes are −inf, which adds nothing to any sum.
template <typename T>
NEUMUTER_INLINE Compute<T> load_logits(const T* from, int n) {
  if (n == kWidth<T>) return load(from);
  using C = Compute<T>;
  T run[kWidth<T>];
  store(splat<C>(-std::numeric_limits<Scalar<C>>::infinity()), run);
  std::memcpy(run, from, n * sizeof(T));
  return load(run);
}

template <typename T>
NEUMUTER_INLINE void store_logits(Compute<T> x, T* to, int n) {
  if (n == kWidth<T>) return store(x, to);
  T run[kWidth<T>];
  store(x, run);
  std::memcpy(to, run, n * sizeof(T));
}

NEUMUTER_INLINE float sum(Floats x) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}
NEUMUTER_INLINE double sum(double x) { return x; }

NEUMUTER_INLINE float largest(Floats x) {
  float most = x[0];
  for (int i = 1; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
}
NEUMUTER_INLINE double largest(double x) { return x; }

template <typename T>
NEUMUTER_INLINE Scalar<Compute<T>> maximum(const T* logits, int64_t size) {
  using C = Compute<T>;
  C most = splat<C>(-std::numeric_limits<Scalar<C>>::infinity());
  for_each_register<T>(0, size, [&](int64_t i, int n) __attribute__((always_inline)) {
    const C x = load_logits(logits + i, n);
    most = x > most ? x : most;
  });
  return largest(most);
}

template <typename T>
static void cross_entropy_of(T* logits, int64_t size, int64_t target, Scalar<Compute<T>>* loss) {
  using C = Compute<T>;
  using S = Scalar<C>;
  const S most = maximum(logits, size);
  double total = 0;
  for_each_sum<T>(size, [&](int64_t first, int64_t last) __attribute__((always_inline)) {
    C sums = splat<C>(S(0));
    for_each_register<T>(first, last, [&](int64_t i, int n) __attribute__((always_inline)) {
      sums += exponential(load_logits(logits + i, n) - most);
    });
    total += sum(sums);
  });
  const S scale = static_cast<S>(1 / total);
  const C wanted = splat<C>(largest(load_logits(logits + target, 1))) - most;
  *loss = static_cast<S>(std::log(total) - largest(wanted));
  for_each_register<T>(0, size, [&](int64_t i, int n) __attribute__((always_inline)) {
    store_logits<T>(exponential(load_logits(logits + i, n) - most) * scale, logits + i, n);
  });
  store_logits<T>(exponential(wanted) * scale - S(1), logits + target, 1);
}

template <typename T>
static void kl_divergence_of(T* logits, const T* reference, int64_t size, Scalar<Compute<T>>* loss) {
  using C = Compute<T>;
  using S = Scalar<C>;
  const S q_most = maximum(logits, size), p_most = maximum(reference, size);
  double q_total = 0, p_total = 0, difference = 0;
  for_each_sum<T>(size, [&](int64_t first, int64_t last) __attribute__((always_inline)) {
    C q_sums = splat<C>(S(0)), p_sums = q_sums, differences = q_sums;
    for_each_register<T>(first, last, [&](int64_t i, int n) __attribute__((always_inline)) {
      const C q = load_logits(logits + i, n) - q_most, p = load_logits(reference + i, n) - p_most;
      const C e = exponential(p);
      q_sums += exponential(q);
      p_sums += e;
      differences += e > S(0) ? e * (p - q) : splat<C>(S(0));  // 0·(−∞ − q) is 0 here
    });
    q_total += sum(q_sums);
    p_total += sum(p_sums);
    difference += sum(differences);
  });
  *loss = static_cast<S>(difference / p_total + std::log(q_total / p_total));
  const S q_scale = static_cast<S>(1 / q_total), p_scale = static_cast<S>(1 / p_total);
  for_each_register<T>(0, size, [&](int64_t i, int n) __attribute__((always_inline)) {
    const C q = load_logits(logits + i, n) - q_most, p = load_logits(reference + i, n) - p_most;
    store_logits<T>(exponential(q) * q_scale - exponential(p) * p_scale, logits + i, n);
  });
}

// Calls f with a null pointer to the dtype's type.
template <typename F>
static void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat:
      return f(static_cast<float*>(nullptr));
    case Dtype::kDouble:
      return f(static_cast<double*>(nullptr));
    case Dtype::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case Dtype::kHalf:
      return f(static_cast<Half*>(nullptr));
  }
}

void cross_entropy(Dtype dtype, void* logits, int64_t n, int64_t target, void* loss) {
  with_type(dtype, [&]<typename T>(T*) {
    cross_entropy_of(static_cast<T*>(logits), n, target, static_cast<Scalar<Compute<T>>*>(loss));
  });
}

void kl_divergence(Dtype dtype, void* logits, const void* reference, int64_t n, void* loss) {
  with_type(dtype, [&]<typename T>(T*) {
    kl_divergence_of(static_cast<T*>(logits), static_cast<const T*>(reference), n,
                     static_cast<Scalar<Compute<T>>*>(loss));
  });
}

}  // namespace NEUMUTER_CAPABILITY
}  // namespace neumuter::cpu
