// Sorting by load, heaviest first, the lower index first on a tie; for all threads of a CTA.
#pragma once

#include <cstdint>

namespace dualpipe {

inline constexpr uint32_t kWarpSize = 32;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

// Loads are not negative, so their bits compare as they do. Complemented in the high half, with the
// index in the low half, ascending keys are the order wanted, and no two keys are equal.
__device__ __forceinline__ uint64_t load_key(float load, uint32_t index) {
  return static_cast<uint64_t>(~__float_as_uint(load)) << 32 | index;
}
__device__ __forceinline__ uint32_t key_load_bits(uint64_t key) {
  return ~static_cast<uint32_t>(key >> 32);
}
__device__ __forceinline__ uint32_t key_index(uint64_t key) { return static_cast<uint32_t>(key); }

// How many of the first n sorted keys are below `key`.
__device__ __forceinline__ uint32_t count_below(const uint64_t* sorted, uint32_t n, uint64_t key) {
  uint32_t below = 0;
  while (n > 0) {
    const uint32_t half = n / 2;
    const bool right = sorted[below + half] < key;
    below = right ? below + half + 1 : below;
    n = right ? n - half - 1 : half;
  }
  return below;
}

// Bitonic sort of one key per lane, ascending. 15 steps of a shuffle, a compare and a select.
__device__ __forceinline__ uint64_t sort_warp(uint64_t key, uint32_t lane) {
#pragma unroll
  for (uint32_t size = 2; size <= kWarpSize; size *= 2) {
#pragma unroll
    for (uint32_t stride = size / 2; stride > 0; stride /= 2) {
      const uint64_t other = __shfl_xor_sync(kAllLanes, key, stride);
      const bool keep_smaller = ((lane & stride) == 0) == ((lane & size) == 0);
      key = (other < key) == keep_smaller ? other : key;
    }
  }
  return key;
}

// Sorts n keys: runs of 32 within warps, then runs are merged in pairs. An element finds its place
// in the merged run by counting, in the sibling run, the keys below its own. Needs a CTA barrier
// before (the keys are there), ends with one, and returns where the sorted keys are: in `keys` or
// in `other`.
__device__ __forceinline__ uint64_t* sort_keys(uint64_t* keys, uint64_t* other, uint32_t n) {
  const uint32_t lane = threadIdx.x % kWarpSize;
  for (uint32_t start = threadIdx.x - lane; start < n; start += blockDim.x) {
    const uint32_t i = start + lane;
    const uint64_t key = sort_warp(i < n ? keys[i] : ~0ull, lane);
    if (i < n) keys[i] = key;
  }
  for (uint32_t run = kWarpSize; run < n; run *= 2) {
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
      const uint32_t pair = i & ~(2 * run - 1);
      const uint32_t sibling = i & run ? pair : pair + run;
      // The last run may be short, or have no sibling.
      const uint32_t size = sibling < n ? min(run, n - sibling) : 0;
      const uint64_t key = keys[i];
      other[pair + (i & (run - 1)) + count_below(keys + sibling, size, key)] = key;
    }
    uint64_t* const merged = other;
    other = keys;
    keys = merged;
  }
  __syncthreads();
  return keys;
}

}  // namespace dualpipe
