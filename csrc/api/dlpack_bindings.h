#pragma once

#include <pybind11/pybind11.h>

namespace dualpipe {

void bind_dlpack(pybind11::module_& m);

}  // namespace dualpipe
