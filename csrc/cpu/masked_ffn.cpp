// masked_ffn and its backward on the CPU.
//
// Work is cut into blocks by the shapes alone, never by the number of threads, and the mask's
// gradient is summed over blocks in a fixed order: the same bits for any number of threads.
#include <algorithm>
#include <cstring>
#include <tuple>

#include "../layout.h"
#include "dtypes.h"

namespace neumuter::cpu {

// Tokens whose mask gradient is summed at a time. Blocks have all columns of their tokens: reading pieces of
// 1024 columns took 1.2 to 1.6 times as long on a Zen 4 where memory is the limit.
constexpr int64_t kTokens = 32;
// Gradients of this size go past the caches. Measured with two cores of a Xeon: 25 % less time for the
// backward pass at 16 MiB a tensor, no gain for the forward pass, a loss at 6 MiB.
constexpr int64_t kStreamBytes = 1 << 24;
constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static void* offset(const Tensor& x, int64_t elements) {
  char* start = static_cast<char*>(x.data_ptr());  // null if x is empty
  return start ? start + elements * static_cast<int64_t>(x.element_size()) : nullptr;
}

// f(begin, end) in parallel over [0, n), where each has `elements`.
template <typename F>
static void split(int64_t n, int64_t elements, F f) {
  torch::stable::parallel_for(0, n, ceil_div(kGrain, std::max<int64_t>(elements, 1)), f);
}

// The checked inputs of a masked FFN. Packed gate and up (kHalves, kInterleaved) share the tensor `gate`.
struct Input {
  Rows gate;
  std::optional<Rows> up;
  Rows mask;
  Layout layout;
  int64_t tokens, columns, masks;
  std::vector<int64_t> mask_rows;  // of each token
  Ffn ffn{};

  Input(const Tensor& gate_, const std::optional<Tensor>& up_, const Tensor& mask_,
        const std::optional<Tensor>& row_ids, int64_t activation, int64_t layout_)
      : gate(gate_), mask(mask_), layout(static_cast<Layout>(layout_)) {
    const Dtype dtype = dtype_of(gate_.scalar_type());
    STD_TORCH_CHECK(layout_ >= 0 && layout_ < static_cast<int64_t>(Layout::kCount),
                    "there is no layout number ", layout_);
    STD_TORCH_CHECK(up_.has_value() == (layout == Layout::kSeparate),
                    "up must be given if layout is SEPARATE, and only then");
    STD_TORCH_CHECK(!packed() || gate.columns % 2 == 0,
                    "gate must have an even number of columns if it holds gate and up");
    tokens = gate.rows;
    columns = packed() ? gate.columns / 2 : gate.columns;
    masks = mask.rows;
    if (up_) {
      up.emplace(*up_);
      STD_TORCH_CHECK(up->rows == tokens && up->columns == columns, "up must have the shape of gate");
      STD_TORCH_CHECK(up_->scalar_type() == gate_.scalar_type(), "up must have the dtype of gate");
    }
    STD_TORCH_CHECK(mask_.dim() == 2 && mask.columns == columns, "mask must have shape [G, F]");
    STD_TORCH_CHECK(mask_.scalar_type() == (dtype == Dtype::kDouble ? ScalarType::Double : ScalarType::Float),
                    "mask must be float32 (float64 with float64 activations)");
    STD_TORCH_CHECK(activation >= 0 && activation < static_cast<int64_t>(Activation::kCount),
                    "there is no activation number ", activation);
    find_mask_rows(row_ids);

    ffn.dtype = dtype;
    ffn.activation = static_cast<Activation>(activation);
    ffn.column_stride = layout == Layout::kInterleaved ? 2 : 1;
    ffn.gate = gate.tensor.data_ptr();
    ffn.gate_stride = gate.stride;
    if (packed()) {
      ffn.up = offset(gate.tensor, up_offset());
      ffn.up_stride = gate.stride;
    } else if (up) {
      ffn.up = up->tensor.data_ptr();
      ffn.up_stride = up->stride;
    }
    ffn.mask = mask.tensor.data_ptr();
    ffn.mask_stride = mask.stride;
    ffn.mask_rows = mask_rows.data();
  }

  bool packed() const { return layout == Layout::kHalves || layout == Layout::kInterleaved; }
  int64_t up_offset() const { return layout == Layout::kInterleaved ? 1 : columns; }  // if packed
  int64_t elements() const { return tokens * columns; }

 private:
  void find_mask_rows(const std::optional<Tensor>& row_ids) {
    mask_rows.resize(tokens);
    if (!row_ids) {
      STD_TORCH_CHECK(tokens == 0 || (masks > 0 && tokens % masks == 0), "without row_ids the ", tokens,
                      " tokens must divide into ", masks, " equal runs, one per mask row");
      for (int64_t t = 0; t < tokens; ++t) mask_rows[t] = t / (tokens / masks);
      return;
    }
    STD_TORCH_CHECK(row_ids->numel() == tokens, "row_ids must have one id per token");
    const Tensor ids = torch::stable::contiguous(*row_ids);
    if (ids.scalar_type() == ScalarType::Int) {
      std::copy_n(static_cast<const int32_t*>(ids.data_ptr()), tokens, mask_rows.begin());
    } else {
      STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long, "row_ids must be int32 or int64");
      std::copy_n(static_cast<const int64_t*>(ids.data_ptr()), tokens, mask_rows.begin());
    }
    for (int64_t id : mask_rows) {
      STD_TORCH_CHECK(id >= -1 && id < masks, "row_ids must lie in [-1, ", masks, "), got ", id);
    }
  }
};

using OptionalTensor = std::optional<Tensor>;

static Tensor masked_ffn(Tensor gate, OptionalTensor up, Tensor mask, OptionalTensor row_ids,
                         int64_t activation, int64_t layout) {
  const Input in(gate, up, mask, row_ids, activation, layout);
  std::vector<int64_t> sizes = sizes_of(in.gate.tensor);
  sizes.back() = in.columns;
  Tensor out = torch::stable::new_empty(in.gate.tensor, sizes);
  const Kernels& k = kernels();
  split(in.tokens, in.columns, [&](int64_t begin, int64_t end) {
    k.masked_ffn(in.ffn, {nullptr, begin, end, in.columns}, out.data_ptr(), in.columns);
  });
  return out;
}

// The tokens in the order of their mask rows, cut into chunks of one row each and of nearly one size.
struct Chunks {
  struct Chunk {
    int64_t mask_row, first, last;
  };
  std::vector<int64_t> order;  // empty: as they are
  std::vector<Chunk> chunks;
  std::vector<int64_t> first_chunk;  // of each mask row; the unmasked tokens come after the last

  explicit Chunks(const Input& in) {
    std::vector<int64_t> starts(in.masks + 2, 0);  // by mask row, unmasked last
    auto group = [&](int64_t t) { return in.mask_rows[t] < 0 ? in.masks : in.mask_rows[t]; };
    bool sorted = true;
    for (int64_t t = 0; t < in.tokens; ++t) {
      ++starts[group(t) + 1];
      sorted &= t == 0 || group(t - 1) <= group(t);
    }
    for (int64_t g = 0; g <= in.masks; ++g) starts[g + 1] += starts[g];
    for (int64_t g = 0; g <= in.masks; ++g) {
      first_chunk.push_back(static_cast<int64_t>(chunks.size()));
      const int64_t all = starts[g + 1] - starts[g], parts = ceil_div(all, kTokens);
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t first = starts[g] + all * i / parts, last = starts[g] + all * (i + 1) / parts;
        chunks.push_back({g < in.masks ? g : -1, first, last});
      }
    }
    if (!sorted) {
      order.resize(in.tokens);
      for (int64_t t = 0; t < in.tokens; ++t) order[starts[group(t)]++] = t;
    }
  }
};

template <typename C>
static void sum_chunks(const Chunks& work, const Input& in, const C* partial, C* grad_mask) {
  split(in.masks * in.columns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin, last; i < end; i = last) {
      const int64_t g = i / in.columns;
      last = std::min(end, (g + 1) * in.columns);
      std::fill(grad_mask + i, grad_mask + last, C(0));
      for (int64_t c = work.first_chunk[g]; c < work.first_chunk[g + 1]; ++c) {
        const C* from = partial + c * in.columns + (i - g * in.columns);
        for (int64_t f = i; f < last; ++f) grad_mask[f] += from[f - i];
      }
    }
  });
}

// The gradients of gate, up and mask; those that are not wanted, and that of a missing up, are empty.
static std::tuple<Tensor, Tensor, Tensor> masked_ffn_backward(Tensor grad_, Tensor gate, OptionalTensor up,
                                                              Tensor mask, OptionalTensor row_ids,
                                                              int64_t activation, int64_t layout,
                                                              bool input_grad, bool mask_grad) {
  const Input in(gate, up, mask, row_ids, activation, layout);
  const Rows grad(grad_);
  STD_TORCH_CHECK(grad.rows == in.tokens && grad.columns == in.columns &&
                      grad_.scalar_type() == in.gate.tensor.scalar_type(),
                  "grad must have the shape and dtype of the output");
  auto like = [](const Tensor& x, bool wanted) {
    return torch::stable::new_empty(x, wanted ? sizes_of(x) : std::vector<int64_t>{0});
  };
  Tensor grad_gate = like(in.gate.tensor, input_grad);
  Tensor grad_up = like(in.gate.tensor, input_grad && in.up);
  FfnGrad d{grad.tensor.data_ptr(), grad.stride, nullptr, nullptr, 0, 0, in.ffn.column_stride};
  if (input_grad) {
    d.grad_gate = grad_gate.data_ptr();
    d.grad_gate_stride = in.gate.columns;
  }
  if (input_grad && in.ffn.up != nullptr) {
    d.grad_up = in.packed() ? offset(grad_gate, in.up_offset()) : grad_up.data_ptr();
    d.grad_up_stride = in.gate.columns;
  }
  Ffn ffn = in.ffn;
  ffn.stream =
      input_grad && in.elements() * static_cast<int64_t>(in.gate.tensor.element_size()) >= kStreamBytes;
  const Chunks work(in);
  const int64_t chunks = static_cast<int64_t>(work.chunks.size());
  Tensor partial = torch::stable::new_empty(
      in.mask.tensor, mask_grad ? std::vector<int64_t>{chunks, in.columns} : std::vector<int64_t>{0});
  const int64_t* order = work.order.empty() ? nullptr : work.order.data();
  const Kernels& k = kernels();
  split(chunks, in.elements() / std::max<int64_t>(chunks, 1), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Chunks::Chunk& chunk = work.chunks[c];
      void* sums = mask_grad ? offset(partial, c * in.columns) : nullptr;
      if (sums) std::memset(sums, 0, in.columns * partial.element_size());
      k.masked_ffn_backward(ffn, d, {order, chunk.first, chunk.last, in.columns}, sums);
    }
  });
  Tensor grad_mask = like(in.mask.tensor, mask_grad);
  if (mask_grad && in.ffn.dtype == Dtype::kDouble) {
    sum_chunks(work, in, static_cast<const double*>(partial.data_ptr()),
               static_cast<double*>(grad_mask.data_ptr()));
  } else if (mask_grad) {
    sum_chunks(work, in, static_cast<const float*>(partial.data_ptr()),
               static_cast<float*>(grad_mask.data_ptr()));
  }
  return {grad_gate, grad_up, grad_mask};
}

STABLE_TORCH_LIBRARY_IMPL(neumuter, CPU, m) {
  m.impl("masked_ffn", TORCH_BOX(&masked_ffn));
  m.impl("masked_ffn_backward", TORCH_BOX(&masked_ffn_backward));
}

}  // namespace neumuter::cpu
