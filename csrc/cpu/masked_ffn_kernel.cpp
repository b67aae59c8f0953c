// The masked activation of an FFN and its backward, for one block of tokens and columns.
#include "kernels.h"
#include "math.h"

namespace neumuter::cpu {
namespace NEUMUTER_CAPABILITY {

// Calls body(f, n) for runs of n of the block's columns: full registers, and one shorter run at the end.
template <int kRun, typename Body>
NEUMUTER_INLINE void for_each_run(const Block& b, Body body) {
  int64_t f = b.first_column;
  for (const int64_t last = b.last_column; f + kRun <= last; f += kRun) body(f, kRun);
  if (f < b.last_column) body(f, static_cast<int>(b.last_column - f));
}

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

template <typename T, Activation A, bool kGlu, int kStride>
static void forward(const Ffn& a, const Block& block, void* out, int64_t out_stride) {
  using C = Compute<T>;
  const bool past_caches = a.stream;
  for_each_token(block, [&](int64_t t) __attribute__((always_inline)) {
    const auto* mask = mask_of<T>(a, t);
    const T* gate = row_of<T>(a.gate, t, a.gate_stride);
    const T* up = row_of<T>(a.up, t, a.up_stride);
    T* to = row_of<T>(out, t, out_stride);
    for_each_run<kWidth<T>>(block, [=](int64_t f, int n) __attribute__((always_inline)) {
      C slope;
      C h = round_to<T>(activation<A>(load_run(gate + f * kStride, kStride, n), &slope));
      if constexpr (kGlu) h *= load_run(up + f * kStride, kStride, n);
      if (mask != nullptr) h *= load_run(mask + f, 1, n);
      store_run<T>(h, to + f, 1, n, past_caches);
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
    S* sums =
        mask == nullptr || grad_mask == nullptr ? nullptr : static_cast<S*>(grad_mask) - block.first_column;
    for_each_run<kWidth<T>>(block, [=](int64_t f, int n) __attribute__((always_inline)) {
      C inner = load_run(grad + f, 1, n);
      C slope, u;
      const C value = round_to<T>(activation<A>(load_run(gate + f * kStride, kStride, n), &slope));
      if constexpr (kGlu) u = load_run(up + f * kStride, kStride, n);
      if (sums != nullptr) {
        C product = value;
        if constexpr (kGlu) product *= u;
        store_run<S>(load_run(sums + f, 1, n) + inner * product, sums + f, 1, n);
      }
      if (!input_grad) return;
      if (mask != nullptr) inner *= load_run(mask + f, 1, n);
      if constexpr (kGlu) {
        store_run<T>(inner * value, grad_up + f * kStride, kStride, n, past_caches);
        inner *= u;
      }
      store_run<T>(round_to<T>(inner) * slope, grad_gate + f * kStride, kStride, n, past_caches);
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
