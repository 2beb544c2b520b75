// How a kernel and the one before it on the stream overlap, where the host allows it
// (programmatic stream serialization); elsewhere both instructions do nothing.
#pragma once

namespace dualpipe::ptx {

// Until every earlier kernel of the stream is complete, and what it wrote is visible.
__device__ __forceinline__ void griddepcontrol_wait() {
  asm volatile("griddepcontrol.wait;" : : : "memory");
}

// The next kernel may be brought onto the SMs as soon as every CTA has come here or has ended.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
}

}  // namespace dualpipe::ptx
