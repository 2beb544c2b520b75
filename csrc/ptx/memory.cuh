// Loads and stores whose ordering and scope the protocols depend on. One instruction each; the name
// says operation, order and scope. All carry a "memory" clobber, so that the compiler moves no
// other access across them.
#pragma once

#include <cstdint>

namespace dualpipe::ptx {

// Accesses that come after it in this thread see what the writer did before its release.
__device__ __forceinline__ uint32_t ld_acquire_sys(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// Accesses that came before it, of this thread and of those it synchronised with, are visible to
// every GPU and to the host before the value is.
__device__ __forceinline__ void st_release_sys(uint32_t* address, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" : : "l"(address), "r"(value) : "memory");
}

// Orders nothing; only guarantees that the value is read again, from where this GPU's atomics act.
__device__ __forceinline__ uint32_t ld_relaxed_gpu(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

}  // namespace dualpipe::ptx
