// The masked activation of an FFN and its backward, for one block of tokens and columns.
#include "kernels.h"
#include "math.h"

namespace neumuter::cpu {
namespace NEUMUTER_CAPABILITY {

// Calls body(t, f, n) for runs of n columns: full registers, and one shorter run at the end of a row.
template <int kRun, typename Body>
NEUMUTER_INLINE void for_each_run(const Block& b, Body body) {
  for (int64_t i = b.first_token; i < b.last_token; ++i) {
    const int64_t t = b.order ? b.order[i] : i;
    int64_t f = b.first_column;
    for (; f + kRun <= b.last_column; f += kRun) body(t, f, kRun);
    if (f < b.last_column) body(t, f, static_cast<int>(b.last_column - f));
  }
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

template <typename T>
NEUMUTER_INLINE Compute<T> load_mask(const Ffn& a, int64_t row, int64_t f, int n) {
  using S = Scalar<Compute<T>>;
  if (row < 0) return splat<Compute<T>>(S(1));
  return load_run(static_cast<const S*>(a.mask) + row * a.mask_stride + f, 1, n);
}

template <typename T>
NEUMUTER_INLINE const T* at(const void* base, int64_t t, int64_t row_stride, int64_t column) {
  return static_cast<const T*>(base) + t * row_stride + column;
}

template <typename T, Activation A, bool kGlu, int kStride>
static void forward(const Ffn& a, const Block& block, void* out, int64_t out_stride) {
  using C = Compute<T>;
  for_each_run<kWidth<T>>(block, [&](int64_t t, int64_t f, int n) __attribute__((always_inline)) {
    C slope;
    C h = round_to<T>(
        activation<A>(load_run(at<T>(a.gate, t, a.gate_stride, f * kStride), kStride, n), &slope));
    if constexpr (kGlu) h *= load_run(at<T>(a.up, t, a.up_stride, f * kStride), kStride, n);
    h *= load_mask<T>(a, a.mask_rows[t], f, n);
    store_run<T>(h, static_cast<T*>(out) + t * out_stride + f, 1, n, a.stream);
  });
  if (a.stream) stream_fence();
}

template <typename T, Activation A, bool kGlu, int kStride>
static void backward(const Ffn& a, const FfnGrad& d, const Block& block, void* grad_mask) {
  using C = Compute<T>;
  using S = Scalar<C>;
  for_each_run<kWidth<T>>(block, [&](int64_t t, int64_t f, int n) __attribute__((always_inline)) {
    const int64_t row = a.mask_rows[t];
    const C grad = load_run(at<T>(d.grad, t, d.grad_stride, f), 1, n);
    C slope;
    const C value = round_to<T>(
        activation<A>(load_run(at<T>(a.gate, t, a.gate_stride, f * kStride), kStride, n), &slope));
    C up;
    if constexpr (kGlu) up = load_run(at<T>(a.up, t, a.up_stride, f * kStride), kStride, n);
    if (grad_mask != nullptr && row >= 0) {
      S* sums = static_cast<S*>(grad_mask) + (f - block.first_column);
      if constexpr (kGlu) {
        store_run<S>(load_run(sums, 1, n) + grad * (value * up), sums, 1, n);
      } else {
        store_run<S>(load_run(sums, 1, n) + grad * value, sums, 1, n);
      }
    }
    if (d.grad_gate == nullptr) return;
    C inner = grad * load_mask<T>(a, row, f, n);
    if constexpr (kGlu) {
      T* grad_up = static_cast<T*>(d.grad_up) + t * d.grad_up_stride + f * kStride;
      store_run<T>(inner * value, grad_up, kStride, n, a.stream);
      inner *= up;
    }
    T* grad_gate = static_cast<T*>(d.grad_gate) + t * d.grad_gate_stride + f * kStride;
    store_run<T>(round_to<T>(inner) * slope, grad_gate, kStride, n, a.stream);
  });
  if (a.stream) stream_fence();
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
