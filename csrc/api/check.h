// Turning CUDA's error codes into exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace dualpipe {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // a sticky last error would be blamed on the next caller's launch
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

}  // namespace dualpipe
