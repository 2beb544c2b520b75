// Kernels that follow each other closely: the next one is brought onto the SMs while the one before
// ends (once that one waits for no peer any more, see finish_epoch), and waits there until its
// results may be read.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dualpipe {

// Such a kernel begins with ptx::griddepcontrol_wait: nothing before that may read or write what
// another kernel does. It has no load that takes memory for constant, __ldg or ld.nc: earlier
// kernels may write while it is on the SMs, and a compiler may move such a load ahead.
template <class Args>
cudaError_t launch_chained(void (*kernel)(Args), uint32_t ctas, uint32_t threads,
                           uint32_t shared_bytes, cudaStream_t stream, const Args& args) {
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = ctas;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace dualpipe
