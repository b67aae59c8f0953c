// What the ops need of a tensor, on top of libtorch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace neumuter {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::vector<int64_t> sizes_of(const Tensor& x) {
  std::vector<int64_t> sizes(x.dim());
  for (int64_t i = 0; i < x.dim(); ++i) sizes[i] = x.size(i);
  return sizes;
}

// A tensor [..., columns] as rows of one stride with adjacent columns. Tensors that are not laid
// out like that (not even as a view of a wider tensor) are copied.
struct Rows {
  Tensor tensor;
  int64_t rows, columns, stride;

  explicit Rows(const Tensor& x) : tensor(x) {
    STD_TORCH_CHECK(x.dim() >= 1, "activations and masks need at least one dimension");
    columns = x.size(x.dim() - 1);
    rows = 1;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
    if (!has_one_stride(x)) tensor = torch::stable::contiguous(x);
    stride = columns;
    for (int64_t i = tensor.dim() - 2; i >= 0; --i) {
      if (tensor.size(i) != 1) {
        stride = tensor.stride(i);
        break;
      }
    }
  }

 private:
  static bool has_one_stride(const Tensor& x) {
    if (x.numel() == 0) return true;
    if (x.size(x.dim() - 1) != 1 && x.stride(x.dim() - 1) != 1) return false;
    int64_t expected = -1;  // not known before the innermost row dimension
    for (int64_t i = x.dim() - 2; i >= 0; --i) {
      if (x.size(i) == 1) continue;
      if (expected >= 0 && x.stride(i) != expected) return false;
      expected = x.stride(i) * x.size(i);
    }
    return true;
  }
};

}  // namespace neumuter
