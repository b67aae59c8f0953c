// The masked activation of an FFN and its backward, for one block of tokens and columns.
#include "kernels.h"
#include "tiles.h"

namespace neumuter::cpu {
namespace NEUMUTER_CAPABILITY {

template <typename C>
struct Ones {
  C x[kTile];
  constexpr Ones() : x{} {
    for (int i = 0; i < kTile; ++i) x[i] = C(1);
  }
};

// The mask of token t from column f on, or ones for an unmasked token.
template <typename C>
static inline const C* mask_run(const Ffn& a, int64_t t, int64_t f) {
  static constexpr Ones<C> ones;
  const int64_t row = a.mask_rows[t];
  return row < 0 ? ones.x : static_cast<const C*>(a.mask) + row * a.mask_stride + f;
}

template <typename Body>
static inline void for_each_tile(const Block& b, Body body) {
  for (int64_t i = b.first_token; i < b.last_token; ++i) {
    const int64_t t = b.order ? b.order[i] : i;
    for (int64_t f = b.first_column; f < b.last_column; f += kTile) {
      body(t, f, static_cast<int>(b.last_column - f < kTile ? b.last_column - f : kTile));
    }
  }
}

template <typename T, Activation A, bool kGlu>
static void forward(const Ffn& a, const Block& block, void* out, int64_t out_stride) {
  using C = typename ComputeType<T>::type;
  for_each_tile(block, [&](int64_t t, int64_t f, int n) {
    alignas(64) C gate_buffer[kTile], up_buffer[kTile], h[kTile];
    const int64_t column = f * a.column_stride;
    const C* __restrict m = mask_run<C>(a, t, f);
    const C* __restrict g =
        load(static_cast<const T*>(a.gate) + t * a.gate_stride + column, a.column_stride, gate_buffer, n);
    for (int i = 0; i < n; ++i) {
      C slope;
      h[i] = activation<A>(g[i], &slope);
    }
    round_to<T>(h, n);
    if constexpr (kGlu) {
      const C* __restrict u =
          load(static_cast<const T*>(a.up) + t * a.up_stride + column, a.column_stride, up_buffer, n);
      for (int i = 0; i < n; ++i) h[i] = (h[i] * u[i]) * m[i];
    } else {
      for (int i = 0; i < n; ++i) h[i] *= m[i];
    }
    store(h, static_cast<T*>(out) + t * out_stride + f, 1, n);
  });
}

template <typename T, Activation A, bool kGlu>
static void backward(const Ffn& a, const FfnGrad& d, const Block& block, void* grad_mask) {
  using C = typename ComputeType<T>::type;
  for_each_tile(block, [&](int64_t t, int64_t f, int n) {
    alignas(64) C gate_buffer[kTile], up_buffer[kTile], grad_buffer[kTile];
    alignas(64) C value[kTile], slope[kTile], inner[kTile];
    const int64_t column = f * a.column_stride;
    const C* __restrict m = mask_run<C>(a, t, f);
    const C* __restrict g =
        load(static_cast<const T*>(a.gate) + t * a.gate_stride + column, a.column_stride, gate_buffer, n);
    const C* __restrict dh = load(static_cast<const T*>(d.grad) + t * d.grad_stride + f, 1, grad_buffer, n);
    const C* __restrict u = nullptr;
    for (int i = 0; i < n; ++i) value[i] = activation<A>(g[i], &slope[i]);
    round_to<T>(value, n);
    if constexpr (kGlu) {
      u = load(static_cast<const T*>(a.up) + t * a.up_stride + column, a.column_stride, up_buffer, n);
    }
    if (grad_mask != nullptr && a.mask_rows[t] >= 0) {
      C* __restrict dm = static_cast<C*>(grad_mask) + (f - block.first_column);
      if constexpr (kGlu) {
        for (int i = 0; i < n; ++i) dm[i] += dh[i] * (value[i] * u[i]);
      } else {
        for (int i = 0; i < n; ++i) dm[i] += dh[i] * value[i];
      }
    }
    if (d.grad_gate == nullptr) return;
    const int64_t out_column = f * d.grad_column_stride;
    if constexpr (kGlu) {
      for (int i = 0; i < n; ++i) {
        const C masked = dh[i] * m[i];
        inner[i] = masked * u[i];
        value[i] = masked * value[i];
      }
      store(value, static_cast<T*>(d.grad_up) + t * d.grad_up_stride + out_column, d.grad_column_stride, n);
    } else {
      for (int i = 0; i < n; ++i) inner[i] = dh[i] * m[i];
    }
    round_to<T>(inner, n);
    for (int i = 0; i < n; ++i) inner[i] *= slope[i];
    store(inner, static_cast<T*>(d.grad_gate) + t * d.grad_gate_stride + out_column, d.grad_column_stride, n);
  });
}

// Calls f<T, A, kGlu>() for the run-time dtype, activation and kind.
template <typename T, typename F>
static inline void with_activation(const Ffn& a, F f) {
  switch (a.activation) {
#define NEUMUTER_CASE(A)                                                                           \
  case Activation::A:                                                                              \
    a.up ? f.template call<T, Activation::A, true>() : f.template call<T, Activation::A, false>(); \
    break;
    NEUMUTER_CASE(kSilu)
    NEUMUTER_CASE(kGelu)
    NEUMUTER_CASE(kGeluTanh)
    NEUMUTER_CASE(kRelu)
    NEUMUTER_CASE(kRelu2)
#undef NEUMUTER_CASE
    case Activation::kCount:
      break;
  }
}

template <typename F>
static inline void with_types(const Ffn& a, F f) {
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
  template <typename T, Activation A, bool kGlu>
  void call() const {
    forward<T, A, kGlu>(a, block, out, out_stride);
  }
};

struct Backward {
  const Ffn& a;
  const FfnGrad& d;
  const Block& block;
  void* grad_mask;
  template <typename T, Activation A, bool kGlu>
  void call() const {
    backward<T, A, kGlu>(a, d, block, grad_mask);
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
