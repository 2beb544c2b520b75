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

// Orders nothing; one access, seen by every GPU.
__device__ __forceinline__ void st_relaxed_sys(uint32_t* address, uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" : : "l"(address), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t ld_relaxed_sys(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void st_relaxed_sys(uint64_t* address, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" : : "l"(address), "l"(value) : "memory");
}

__device__ __forceinline__ uint64_t ld_relaxed_sys(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

// Two such accesses in one instruction; in which order they are made is not said.
__device__ __forceinline__ void st_relaxed_sys_v2(void* address, const ulonglong2& v) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};"
               :
               : "l"(address), "l"(v.x), "l"(v.y)
               : "memory");
}

__device__ __forceinline__ ulonglong2 ld_relaxed_sys_v2(const void* address) {
  ulonglong2 v;
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];"
               : "=l"(v.x), "=l"(v.y)
               : "l"(address)
               : "memory");
  return v;
}

// 16 bytes that this kernel reads once and nobody writes meanwhile: not kept in L1.
__device__ __forceinline__ uint4 ld_nc_once_v4(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address)
               : "memory");
  return v;
}

// 16 bytes that a peer has written during this kernel, after its flag was acquired: read once.
__device__ __forceinline__ uint4 ld_once_v4(const void* address) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address)
               : "memory");
  return v;
}

// 16 bytes that are not read again soon.
__device__ __forceinline__ void st_once_v4(void* address, const uint4& v) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

}  // namespace dualpipe::ptx
