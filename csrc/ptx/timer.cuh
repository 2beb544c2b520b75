// The clock that every SM of a GPU shares.
#pragma once

#include <cstdint>

namespace dualpipe::ptx {

// Nanoseconds; advances in steps of up to about a microsecond. Volatile, or a loop would read it
// once.
__device__ __forceinline__ uint64_t globaltimer_ns() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

}  // namespace dualpipe::ptx
