// Adds the expert-parallel kernels to the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace dualpipe {

void bind_ep(pybind11::module_& m);

}  // namespace dualpipe
