// Rows of BF16 to FP8, by one warp; see fp8.cuh.
#pragma once

#include <cstdint>

#include "ep/fp8.cuh"
#include "ptx/memory.cuh"

namespace dualpipe {

// Reads `num_values` BF16 values, a multiple of 128, from global memory, and writes them as FP8,
// with their scales, to shared memory. Called by a whole warp; the caller orders the writes before
// whatever reads them.
//
// Four lanes share a block, 32 values each: few shuffles, and one scale for 32 values. Together
// they read 64 bytes at a time, whole sectors, in an order that depends on their place in the warp,
// so that the writes have no conflicts of banks. Two groups of 8 blocks a round: what one waits
// for, the other's work hides.
//
// Straight from memory to registers: through a stage of shared memory, whose number bounds the rows
// under way, a dispatch took a third longer (measured).
template <bool kPow2>
__device__ void quantize(const uint8_t* from, uint8_t* to, float* scales, uint32_t num_values) {
  constexpr uint32_t kGroups = 2, kUnits = 4, kQuads = 8;
  const uint32_t num_blocks = num_values / kQuantBlock;
  const uint32_t quad = threadIdx.x % 32 / 4, place = threadIdx.x % 4;
  for (uint32_t first = 0; first < num_blocks; first += kGroups * kQuads) {
    uint4 v[kGroups][kUnits];
    __nv_bfloat162 most[kGroups];
#pragma unroll
    for (uint32_t g = 0; g < kGroups; ++g) {
      const uint32_t block = first + g * kQuads + quad;
#pragma unroll
      for (uint32_t j = 0; j < kUnits; ++j) {
        const uint32_t at = block * 2 * kQuantBlock + (j + quad) % kUnits * 64 + place * 16;
        v[g][j] = block < num_blocks ? ptx::ld_nc_once_v4(from + at) : uint4{};
      }
    }
#pragma unroll
    for (uint32_t g = 0; g < kGroups; ++g) {
      most[g] = __hmax2_nan(__hmax2_nan(most_of(v[g][0]), most_of(v[g][1])),
                            __hmax2_nan(most_of(v[g][2]), most_of(v[g][3])));
      most[g] = __hmax2_nan(most[g], __shfl_xor_sync(~0u, most[g], 1));
      most[g] = __hmax2_nan(most[g], __shfl_xor_sync(~0u, most[g], 2));
    }
#pragma unroll
    for (uint32_t g = 0; g < kGroups; ++g) {
      const QuantScale q = quant_scale<kPow2>(__bfloat162float(__hmax_nan(most[g].x, most[g].y)));
      const uint32_t block = first + g * kQuads + quad;
      if (block >= num_blocks) continue;
#pragma unroll
      for (uint32_t j = 0; j < kUnits; ++j) {
        const uint32_t at = block * kQuantBlock + (j + quad) % kUnits * 32 + place * 8;
        *reinterpret_cast<uint2*>(to + at) = to_fp8x8(v[g][j], q.inverse);
      }
      if (place == 0) scales[block] = q.scale;
    }
  }
}

}  // namespace dualpipe
