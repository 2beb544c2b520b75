// BF16 to FP8 E4M3 with one float32 scale per 128 values: the numbers. Bit for bit what
// dualpipe_ext.ep.fp8.quantize defines.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>

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

// Eight BF16 values times `inverse`, as eight of FP8.
__device__ __forceinline__ uint2 to_fp8x8(const uint4& v, float inverse) {
  return {to_fp8x2(v.x, inverse) | to_fp8x2(v.y, inverse) << 16,
          to_fp8x2(v.z, inverse) | to_fp8x2(v.w, inverse) << 16};
}

// 8 values.
__device__ __forceinline__ __nv_bfloat162 most_of(const uint4& v) {
  const auto as_pair = [](uint32_t word) { return *reinterpret_cast<__nv_bfloat162*>(&word); };
  // Propagates NaN, as torch's amax does.
  return __hmax2_nan(__hmax2_nan(__habs2(as_pair(v.x)), __habs2(as_pair(v.y))),
                     __hmax2_nan(__habs2(as_pair(v.z)), __habs2(as_pair(v.w))));
}

}  // namespace dualpipe
