// The ops on GPU tensors whose kernels are Triton's: kinds of calls that were seen before are repeated here,
// the others go to Python, which records them (neumuter_kernels/recording.py).
#include "ops.h"

#include <pybind11/stl.h>

#include <tuple>

#include "plan.h"

namespace neumuter::launch {

namespace {

using OptionalTensor = std::optional<Tensor>;

// What Python raised in this thread. libtorch's stable ABI carries no exceptions of Python's.
thread_local PyObject* raised = nullptr;

void throw_what_python_raised() {
  if (raised == nullptr) return;
  const PyGILState_STATE state = PyGILState_Ensure();
  PyObject* error = std::exchange(raised, nullptr);
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error)), error);
  Py_DECREF(error);
  pybind11::error_already_set thrown;
  PyGILState_Release(state);
  throw std::move(thrown);
}

template <std::size_t kOutputs, typename... Arguments>
std::vector<Tensor> run(int64_t op, const char* recording, const Arguments&... arguments) {
  Call call(op);
  (call.add(arguments), ...);
  if (auto outputs = call.repeat()) return std::move(*outputs);
  StableIValue stack[] = {torch::stable::detail::from(arguments)..., torch::stable::detail::from(call.key())};
  static_assert(std::size(stack) >= kOutputs);
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(recording, "", stack, TORCH_ABI_VERSION));
  std::vector<Tensor> outputs;
  for (std::size_t i = 0; i < kOutputs; ++i) {
    outputs.push_back(torch::stable::detail::to<Tensor>(stack[i]));
  }
  throw_what_python_raised();
  return outputs;
}

Tensor masked_ffn(Tensor gate, OptionalTensor up, Tensor mask, OptionalTensor row_ids, int64_t activation,
                  int64_t layout) {
  return run<1>(0, "neumuter::_record_masked_ffn", gate, up, mask, row_ids, activation, layout)[0];
}

std::tuple<Tensor, Tensor, Tensor> masked_ffn_backward(Tensor grad, Tensor gate, OptionalTensor up,
                                                       Tensor mask, OptionalTensor row_ids,
                                                       int64_t activation, int64_t layout, bool input_grad,
                                                       bool mask_grad) {
  auto found = run<3>(1, "neumuter::_record_masked_ffn_backward", grad, gate, up, mask, row_ids, activation,
                      layout, input_grad, mask_grad);
  return {std::move(found[0]), std::move(found[1]), std::move(found[2])};
}

ScalarType dtype_named(const std::string& name) {
  if (name == "float32") return ScalarType::Float;
  if (name == "float64") return ScalarType::Double;
  if (name == "bfloat16") return ScalarType::BFloat16;
  if (name == "float16") return ScalarType::Half;
  throw pybind11::value_error("no plan allocates tensors of " + name);
}

using PythonAllocation = std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::string, bool>;
using PythonLaunch = std::tuple<uint64_t, std::tuple<unsigned, unsigned, unsigned>, unsigned, unsigned,
                                std::vector<std::pair<int, uint64_t>>>;

void learn_plan(std::vector<int64_t> key, const std::vector<PythonAllocation>& allocations,
                const std::vector<PythonLaunch>& launches, std::vector<int> outputs) {
  Plan plan;
  for (const auto& [sizes, strides, dtype, aligned] : allocations) {
    plan.allocations.push_back({sizes, strides, dtype_named(dtype), aligned});
  }
  for (const auto& [kernel, grid, threads, shared, parameters] : launches) {
    const auto [x, y, z] = grid;
    Launch launch{reinterpret_cast<Function>(kernel), {{x, y, z}, threads, shared}, {}};
    for (const auto& [tensor, value] : parameters) launch.parameters.push_back({tensor, value});
    plan.launches.push_back(std::move(launch));
  }
  plan.outputs = std::move(outputs);
  learn(std::move(key), std::move(plan));
}

// Takes the place of Python on GPU tensors, for as long as the process runs.
void serve_recorded_op(const std::string& name) {
  static auto& library = *new torch::stable::detail::StableLibrary(
      torch::stable::detail::StableLibrary::Kind::IMPL, "neumuter", "CUDA", __FILE__, __LINE__);
  if (name == "masked_ffn") {
    library.impl("masked_ffn", TORCH_BOX(&masked_ffn));
  } else if (name == "masked_ffn_backward") {
    library.impl("masked_ffn_backward", TORCH_BOX(&masked_ffn_backward));
  } else {
    throw pybind11::value_error("there is no recorded op " + name);
  }
}

}  // namespace

void bind(pybind11::module_& m) {
  m.def("why_no_driver", &why_no_driver);
  m.def("parameters_of", [](uint64_t kernel) { return parameters_of(reinterpret_cast<Function>(kernel)); });
  m.def("serve_recorded_op", &serve_recorded_op);
  m.def("learn_plan", &learn_plan);
  m.def("forget_plans", &forget);
  m.def("known_plans", &known);
  m.def("keep_raised",
        [](const pybind11::object& error) { Py_XDECREF(std::exchange(raised, error.inc_ref().ptr())); });
}

}  // namespace neumuter::launch
