// The schemas of the ops (namespace torch.ops.neumuter) and what the build was made with.
//
// Everything that touches torch goes through libtorch's stable ABI. neumuter_kernels/reference.py says what
// each op means; the file of its name in neumuter_kernels has its fake kernel and its gradient.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "cpu/kernels.h"
#include "launch/ops.h"

STABLE_TORCH_LIBRARY(neumuter, m) {
  m.def(
      "masked_ffn(Tensor gate, Tensor? up, Tensor mask, Tensor? row_ids, int activation, int layout) "
      "-> Tensor");
  m.def(
      "masked_ffn_backward(Tensor grad, Tensor gate, Tensor? up, Tensor mask, Tensor? row_ids, "
      "int activation, int layout, bool input_grad, bool mask_grad) -> (Tensor, Tensor, Tensor)");
  // Python's part of the ops in csrc/launch, which call them.
  m.def(
      "_record_masked_ffn(Tensor gate, Tensor? up, Tensor mask, Tensor? row_ids, int activation, "
      "int layout, int[] key) -> Tensor");
  m.def(
      "_record_masked_ffn_backward(Tensor grad, Tensor gate, Tensor? up, Tensor mask, Tensor? row_ids, "
      "int activation, int layout, bool input_grad, bool mask_grad, int[] key) -> (Tensor, Tensor, Tensor)");
  m.def(
      "hard_concrete(Tensor scores, Tensor sample_ids, Tensor step, int seed, int layer, "
      "float temperature, float gamma, float zeta, bool training) -> Tensor");
  m.def(
      "hard_concrete_backward(Tensor grad, Tensor scores, Tensor sample_ids, Tensor step, int seed, "
      "int layer, float temperature, float gamma, float zeta, bool training) -> Tensor");
  m.def(
      "select_muted(Tensor scores, int[] widths, int? budget, float threshold, float gamma, "
      "float zeta) -> (Tensor, Tensor, Tensor)");
  m.def(
      "mute_(Tensor(a!) hidden, Tensor indptr, Tensor indices, Tensor gains, Tensor? row_ids, "
      "int layer) -> ()");
  m.def("cross_entropy_(Tensor(a!) logits, Tensor targets) -> Tensor");
  m.def("kl_divergence_(Tensor(a!) logits, Tensor reference) -> Tensor");
}

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = NEUMUTER_TORCH_VERSION;
    info["cuda"] = NEUMUTER_CUDA_VERSION;  // empty: built without CUDA
    info["cuda_architectures"] = NEUMUTER_CUDA_ARCHITECTURES;
    info["compiler"] = NEUMUTER_COMPILER;
    info["flags"] = NEUMUTER_FLAGS;
    return info;
  });
  m.def("cpu_capability", [] { return neumuter::cpu::kernels().name; });
  neumuter::launch::bind(m);
}
