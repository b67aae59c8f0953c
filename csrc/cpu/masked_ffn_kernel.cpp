// The masked activation of an FFN and its backward, for one block of tokens and columns.
#include "kernels.h"
#include "math.h"

namespace neumuter::cpu {
namespace NEUMUTER_CAPABILITY {

// Calls body(t) for the block's tokens.
template <typename Body>
NEUMUTER_INLINE void for_each_token(const Block& b, Body body) {
  for (int64_t i = b.first_token; i < b.last_token; ++i) body(b.order ? b.order[i] : i);
}

// n adjacent elements (or every other one) as a register; the lanes from n on are zero.
template <typename T>
NEUMUTER_INLINE Compute<T> load_run(const T* from, int64_t stride, int n) {
  if (stride == 1 && n == kWidth<T>) return load(from);
  T run[kWidth<T>] = {};
  for (int i = 0; i < n; ++i) run[i] = from[i * stride];
  return load(run);
}

template <typename T>
NEUMUTER_INLINE void store_run(Compute<T> x, T* to, int64_t stride, int n, bool past_caches = false) {
  if (stride == 1 && n == kWidth<T>) {
    constexpr uintptr_t kBytes = sizeof(T) * kWidth<T>;
    if (past_caches && reinterpret_cast<uintptr_t>(to) % kBytes == 0) return stream(x, to);
    return store(x, to);
  }
  T run[kWidth<T>];
  store(x, run);
  for (int i = 0; i < n; ++i) to[i * stride] = run[i];
}

// The mask of token t; null if it is unmasked.
template <typename T>
NEUMUTER_INLINE const Scalar<Compute<T>>* mask_of(const Ffn& a, int64_t t) {
  const int64_t row = a.mask_rows[t];
  return row < 0 ? nullptr : static_cast<const Scalar<Compute<T>>*>(a.mask) + row * a.mask_stride;
}

template <typename T>
NEUMUTER_INLINE const T* row_of(const void* base, int64_t t, int64_t stride) {
  return static_cast<const T*>(base) + t * stride;
}
template <typename T>
NEUMUTER_INLINE T* row_of(void* base, int64_t t, int64_t stride) {
  return static_cast<T*>(base) + t * stride;
}

// In the loops over columns nothing is read through `a`: the stores there might change it, for all that
// the compiler knows, and it would read it again for every register.

// A run of columns is worked on in two loops: the activation first, then what is multiplied with it. In one
// loop the operations on a register are a chain so long that a processor cannot hold enough of the next ones
// to be busy: on a Zen 4 that took 1.4 times as long in bfloat16.
constexpr int kRegisters = 16;
template <typename T>
constexpr int kRun = kRegisters * kWidth<T>;
constexpr int kRunsAhead = 4;  // are asked for early: with as long a loop, few loads wait at a time

// Calls body(f, columns) for the runs of all columns; the last one may be shorter.
template <typename T, typename Body>
NEUMUTER_INLINE void for_each_run(int64_t columns, Body body) {
  for (int64_t f = 0; f < columns; f += kRun<T>) {
    body(f, static_cast<int>(columns - f < kRun<T> ? columns - f : kRun<T>));
  }
}

// Calls body(i, n) for the registers of a run: n of a register's lanes, from column i.
template <typename T, typename Body>
NEUMUTER_INLINE void for_each_register(int columns, Body body) {
  int i = 0;
  for (; i + kWidth<T> <= columns; i += kWidth<T>) body(i, kWidth<T>);
  if (i < columns) body(i, columns - i);
}

// Asks for the run that comes kRunsAhead runs after this one, which may lie past the end of all.
template <typename T, int kStride>
NEUMUTER_INLINE void prefetch(const T* run) {
  constexpr uintptr_t kBytes = kRun<T> * kStride * sizeof(T), kLine = 64;
  const uintptr_t from = reinterpret_cast<uintptr_t>(run) + kRunsAhead * kBytes;
  for (uintptr_t i = 0; i < kBytes; i += kLine) __builtin_prefetch(reinterpret_cast<const void*>(from + i));
}

template <typename T, Activation A, bool kGlu, int kStride>
static void forward(const Ffn& a, const Block& block, void* out, int64_t out_stride) {
  using C = Compute<T>;
  const bool past_caches = a.stream;
  for_each_token(block, [&](int64_t t) __attribute__((always_inline)) {
    const auto* mask = mask_of<T>(a, t);
    const T* gate = row_of<T>(a.gate, t, a.gate_stride);
    const T* up = row_of<T>(a.up, t, a.up_stride);
    T* to = row_of<T>(out, t, out_stride);
    for_each_run<T>(block.columns, [=](int64_t f, int columns) __attribute__((always_inline)) {
      prefetch<T, kStride>(gate + f * kStride);
      if constexpr (kGlu) prefetch<T, kStride>(up + f * kStride);
      C values[kRegisters];
      for_each_register<T>(columns, [&](int i, int n) __attribute__((always_inline)) {
        C slope;
        values[i / kWidth<T>] = activation<A>(load_run(gate + (f + i) * kStride, kStride, n), &slope);
      });
      for_each_register<T>(columns, [&](int i, int n) __attribute__((always_inline)) {
        C h = round_to<T>(values[i / kWidth<T>]);
        if constexpr (kGlu) h *= load_run(up + (f + i) * kStride, kStride, n);
        if (mask != nullptr) h *= load_run(mask + f + i, 1, n);
        store_run<T>(h, to + f + i, 1, n, past_caches);
      });
    });
  });
  if (past_caches) stream_fence();
}

template <typename T, Activation A, bool kGlu, int kStride>
static void backward(const Ffn& a, const FfnGrad& d, const Block& block, void* grad_mask) {
  using C = Compute<T>;
  using S = Scalar<C>;
  const bool past_caches = a.stream, input_grad = d.grad_gate != nullptr;
  for_each_token(block, [&](int64_t t) __attribute__((always_inline)) {
    const S* mask = mask_of<T>(a, t);
    const T* grad = row_of<T>(d.grad, t, d.grad_stride);
    const T* gate = row_of<T>(a.gate, t, a.gate_stride);
    const T* up = row_of<T>(a.up, t, a.up_stride);
    T* grad_gate = row_of<T>(d.grad_gate, t, d.grad_gate_stride);
    T* grad_up = row_of<T>(d.grad_up, t, d.grad_up_stride);
    S* sums = mask == nullptr ? nullptr : static_cast<S*>(grad_mask);
    for_each_run<T>(block.columns, [=](int64_t f, int columns) __attribute__((always_inline)) {
      prefetch<T, 1>(grad + f);
      prefetch<T, kStride>(gate + f * kStride);
      if constexpr (kGlu) prefetch<T, kStride>(up + f * kStride);
      C values[kRegisters], slopes[kRegisters];
      for_each_register<T>(columns, [&](int i, int n) __attribute__((always_inline)) {
        const C x = load_run(gate + (f + i) * kStride, kStride, n);
        values[i / kWidth<T>] = activation<A>(x, &slopes[i / kWidth<T>]);
      });
      for_each_register<T>(columns, [&](int i, int n) __attribute__((always_inline)) {
        const int64_t at = f + i;
        const C value = round_to<T>(values[i / kWidth<T>]);
        C inner = load_run(grad + at, 1, n), u;
        if constexpr (kGlu) u = load_run(up + at * kStride, kStride, n);
        if (sums != nullptr) {
          C product = value;
          if constexpr (kGlu) product *= u;
          store_run<S>(load_run(sums + at, 1, n) + inner * product, sums + at, 1, n);
        }
        if (!input_grad) return;
        if (mask != nullptr) inner *= load_run(mask + at, 1, n);
        if constexpr (kGlu) {
          store_run<T>(inner * value, grad_up + at * kStride, kStride, n, past_caches);
          inner *= u;
        }
        store_run<T>(round_to<T>(inner) * slopes[i / kWidth<T>], grad_gate + at * kStride, kStride, n,
                     past_caches);
      });
    });
  });
  if (past_caches) stream_fence();
}

// Calls f<T, A, kGlu, kStride>() for the run-time dtype, activation and layout.
template <typename T, Activation A, typename F>
static void with_layout(const Ffn& a, F f) {
  if (a.up == nullptr) return f.template call<T, A, false, 1>();
  if (a.column_stride == 1) return f.template call<T, A, true, 1>();
  f.template call<T, A, true, 2>();
}

template <typename T, typename F>
static void with_activation(const Ffn& a, F f) {
  switch (a.activation) {
    case Activation::kSilu:
      return with_layout<T, Activation::kSilu>(a, f);
    case Activation::kGelu:
      return with_layout<T, Activation::kGelu>(a, f);
    case Activation::kGeluTanh:
      return with_layout<T, Activation::kGeluTanh>(a, f);
    case Activation::kRelu:
      return with_layout<T, Activation::kRelu>(a, f);
    case Activation::kRelu2:
      return with_layout<T, Activation::kRelu2>(a, f);
    case Activation::kIdentity:
      return with_layout<T, Activation::kIdentity>(a, f);
    case Activation::kCount:
      break;
  }
}

template <typename F>
static void with_types(const Ffn& a, F f) {
  switch (a.dtype) {
    case Dtype::kFloat:
      return with_activation<float>(a, f);
    case Dtype::kDouble:
      return with_activation<double>(a, f);
    case Dtype::kBFloat16:
      return with_activation<BFloat16>(a, f);
    case Dtype::kHalf:
      return with_activation<Half>(a, f);
  }
}

struct Forward {
  const Ffn& a;
  const Block& block;
  void* out;
  int64_t out_stride;
  template <typename T, Activation A, bool kGlu, int kStride>
  void call() const {
    forward<T, A, kGlu, kStride>(a, block, out, out_stride);
  }
};

struct Backward {
  const Ffn& a;
  const FfnGrad& d;
  const Block& block;
  void* grad_mask;
  template <typename T, Activation A, bool kGlu, int kStride>
  void call() const {
    backward<T, A, kGlu, kStride>(a, d, block, grad_mask);
  }
};

void masked_ffn(const Ffn& a, const Block& block, void* out, int64_t out_stride) {
  with_types(a, Forward{a, block, out, out_stride});
}

void masked_ffn_backward(const Ffn& a, const FfnGrad& d, const Block& block, void* grad_mask) {
  with_types(a, Backward{a, d, block, grad_mask});
}

}  // namespace NEUMUTER_CAPABILITY
}  // namespace neumuter::cpu
