// The checked arguments of mute_, on any device.
#pragma once

#include <cstdint>
#include <optional>

#include "tensors.h"

namespace neumuter {

inline void check_device(const Tensor& hidden, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cuda() == hidden.is_cuda() && x.get_device() == hidden.get_device(),
                  "all tensors must be on the device of hidden");
}

// Whether the contiguous x lies where a write to a row of hidden could change it.
inline bool meets(const Rows& hidden, const Tensor& x) {
  const auto start = [](const Tensor& of) { return reinterpret_cast<std::uintptr_t>(of.data_ptr()); };
  const auto bytes = [](const Tensor& of, int64_t n) {
    return static_cast<std::uintptr_t>(n) * of.element_size();
  };
  if (hidden.rows == 0 || hidden.columns == 0 || x.numel() == 0) return false;
  const int64_t span = (hidden.rows - 1) * hidden.stride + hidden.columns;
  return start(x) < start(hidden.tensor) + bytes(hidden.tensor, span) &&
         start(hidden.tensor) < start(x) + bytes(x, x.numel());
}

struct Mutes {
  Rows hidden;
  Tensor indptr, indices, gains;
  std::optional<Tensor> rows;
  int64_t sets, layers, layer, pool;

  Mutes(const Tensor& hidden_, const Tensor& indptr_, const Tensor& indices_, const Tensor& gains_,
        const std::optional<Tensor>& rows_, int64_t layer_)
      : hidden(hidden_),
        indptr(torch::stable::contiguous(indptr_)),
        indices(torch::stable::contiguous(indices_)),
        gains(torch::stable::contiguous(gains_)),
        layer(layer_) {
    STD_TORCH_CHECK(hidden.tensor.data_ptr() == hidden_.data_ptr() &&
                        (hidden.rows <= 1 || hidden.stride >= hidden.columns),
                    "hidden must have rows of one stride that do not overlap");
    for (const Tensor& x : {indptr, indices, gains}) check_device(hidden_, x);
    STD_TORCH_CHECK(indptr.dim() == 2 && indptr.size(1) >= 1 && indptr.scalar_type() == ScalarType::Int,
                    "indptr must be int32 [S, L + 1]");
    sets = indptr.size(0);
    layers = indptr.size(1) - 1;
    STD_TORCH_CHECK(layer >= 0 && layer < layers, "layer must lie in [0, ", layers, "), got ", layer);
    STD_TORCH_CHECK(indices.dim() == 1 && indices.scalar_type() == ScalarType::Int,
                    "indices must be int32 [N]");
    STD_TORCH_CHECK(gains.dim() == 1 && gains.scalar_type() == ScalarType::Float,
                    "gains must be float32 [N]");
    pool = indices.numel();
    STD_TORCH_CHECK(gains.numel() == pool, "gains must have one entry per index");
    for (const Tensor& x : {indptr, indices, gains}) {
      STD_TORCH_CHECK(!meets(hidden, x), "hidden must not share memory with indptr, indices or gains");
    }
    if (rows_) {
      rows = torch::stable::contiguous(*rows_);
      check_device(hidden_, *rows);
      STD_TORCH_CHECK(!meets(hidden, *rows), "hidden must not share memory with row_ids");
      const ScalarType type = rows->scalar_type();
      STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, "row_ids must be int32 or int64");
      STD_TORCH_CHECK(rows->numel() == hidden.rows, "row_ids must have one entry per token");
    } else {
      STD_TORCH_CHECK(sets > 0 && hidden.rows % sets == 0, "without row_ids the ", hidden.rows,
                      " tokens must divide into ", sets, " equal runs, one per set");
    }
  }
};

}  // namespace neumuter
