// BF16 to FP8 E4M3 with one float32 scale per 128 values, by one warp. Bit for bit what
// dualpipe_ext.ep.fp8.quantize defines.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "ptx/memory.cuh"

namespace dualpipe {

inline constexpr uint32_t kQuantBlock = 128;

struct QuantScale {
  float scale;    // value = fp8 * scale
  float inverse;  // fp8 = value * inverse, rounded
};

template <bool kPow2>
__device__ __forceinline__ QuantScale quant_scale(float amax) {
  // 2^-100 keeps the inverse finite. Not fmaxf, which would lose NaN.
  amax = amax < 7.888609052210118e-31f ? 7.888609052210118e-31f : amax;
  if (kPow2) {
    // The smallest 2^e with amax <= 448 * 2^e; 448 is 1.75 * 2^8. The mantissa decides whether to
    // round up; no arithmetic, so nothing is rounded.
    const uint32_t bits = __float_as_uint(amax);
    const uint32_t exponent = (bits >> 23) - 8 + ((bits & 0x7fffffu) > 0x600000u ? 1 : 0);
    return {__uint_as_float(exponent << 23), __uint_as_float((254 - exponent) << 23)};
  }
  return {__fmul_rn(amax, 1.0f / 448.0f), __fmul_rn(__frcp_rn(amax), 448.0f)};
}

__device__ __forceinline__ float2 unpack_bf16x2(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

// Two BF16 values times `inverse`, as two FP8 values.
__device__ __forceinline__ uint32_t to_fp8x2(uint32_t pair, float inverse) {
  float2 v = unpack_bf16x2(pair);
  v.x = __fmul_rn(v.x, inverse);
  v.y = __fmul_rn(v.y, inverse);
  return __nv_cvt_float2_to_fp8x2(v, __NV_SATFINITE, __NV_E4M3);
}

// 8 values.
__device__ __forceinline__ __nv_bfloat162 most_of(const uint4& v) {
  const auto as_pair = [](uint32_t word) { return *reinterpret_cast<__nv_bfloat162*>(&word); };
  // Propagates NaN, as torch's amax does.
  return __hmax2_nan(__hmax2_nan(__habs2(as_pair(v.x)), __habs2(as_pair(v.y))),
                     __hmax2_nan(__habs2(as_pair(v.z)), __habs2(as_pair(v.w))));
}

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
        *reinterpret_cast<uint2*>(to + at) = {
            to_fp8x2(v[g][j].x, q.inverse) | to_fp8x2(v[g][j].y, q.inverse) << 16,
            to_fp8x2(v[g][j].z, q.inverse) | to_fp8x2(v[g][j].w, q.inverse) << 16};
      }
      if (place == 0) scales[block] = q.scale;
    }
  }
}

}  // namespace dualpipe
