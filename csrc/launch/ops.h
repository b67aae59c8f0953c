#pragma once

#include <pybind11/pybind11.h>

namespace neumuter::launch {

// What neumuter_kernels/recording.py calls.
void bind(pybind11::module_& m);

}  // namespace neumuter::launch
