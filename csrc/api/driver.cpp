#include "api/driver.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "api/check.h"

namespace dualpipe {
namespace {

template <class Function>
Function* driver_function(const char* name, unsigned int cuda_version) {
  void* pointer = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  check_cuda(
      cudaGetDriverEntryPointByVersion(name, &pointer, cuda_version, cudaEnableDefault, &found),
      name);
  if (found != cudaDriverEntryPointSuccess) {
    throw std::runtime_error(std::string("expected a CUDA driver that offers ") + name);
  }
  return reinterpret_cast<Function*>(pointer);
}

}  // namespace

AddressRange address_range(uint64_t address) {
  // The runtime answers for any address, the driver function below only for those it knows.
  cudaPointerAttributes attributes{};
  check_cuda(cudaPointerGetAttributes(&attributes, reinterpret_cast<void*>(address)),
             "cudaPointerGetAttributes");
  if (attributes.type != cudaMemoryTypeDevice) {
    throw std::invalid_argument("expected an address in GPU memory, got " +
                                std::to_string(address));
  }
  // The signature is that of CUDA 4.0, unchanged since.
  static const auto get_attribute =
      driver_function<CUresult(void*, CUpointer_attribute, CUdeviceptr)>("cuPointerGetAttribute",
                                                                         4000);
  CUdeviceptr start = 0;
  size_t bytes = 0;
  if (get_attribute(&start, CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, address) != CUDA_SUCCESS ||
      get_attribute(&bytes, CU_POINTER_ATTRIBUTE_RANGE_SIZE, address) != CUDA_SUCCESS) {
    throw std::runtime_error("expected the driver to know the allocation of a device address");
  }
  return {start, bytes};
}

}  // namespace dualpipe
