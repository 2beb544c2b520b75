// 16 bytes of a row as numbers to be summed.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace dualpipe {

// Sums are rounded step by step as written, never fused: results must not depend on the compiler.
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }

struct Bf16Row {
  using Sum = float;
  static constexpr uint32_t kCount = 8;  // numbers in 16 bytes
  __device__ static void unpack(uint32_t word, float* out) {
    out[0] = __uint_as_float(word << 16);
    out[1] = __uint_as_float(word & 0xffff0000u);
  }
  __device__ static uint32_t pack(const float* in) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(in[0], in[1]);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

struct F16Row {
  using Sum = float;
  static constexpr uint32_t kCount = 8;
  __device__ static void unpack(uint32_t word, float* out) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
    out[0] = pair.x;
    out[1] = pair.y;
  }
  __device__ static uint32_t pack(const float* in) {
    const __half2 pair = __floats2half2_rn(in[0], in[1]);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

struct F32Row {
  using Sum = float;
  static constexpr uint32_t kCount = 4;
};

struct F64Row {
  using Sum = double;
  static constexpr uint32_t kCount = 2;
};

template <class Row>
struct Numbers {
  typename Row::Sum v[Row::kCount];

  __device__ static Numbers zero() {
    Numbers n;
#pragma unroll
    for (uint32_t i = 0; i < Row::kCount; ++i) n.v[i] = 0;
    return n;
  }

  __device__ static Numbers from(const uint4& bits) {
    Numbers n;
    if constexpr (Row::kCount == 8) {
      Row::unpack(bits.x, n.v);
      Row::unpack(bits.y, n.v + 2);
      Row::unpack(bits.z, n.v + 4);
      Row::unpack(bits.w, n.v + 6);
    } else if constexpr (Row::kCount == 4) {
      n.v[0] = __uint_as_float(bits.x);
      n.v[1] = __uint_as_float(bits.y);
      n.v[2] = __uint_as_float(bits.z);
      n.v[3] = __uint_as_float(bits.w);
    } else {
      n.v[0] = __hiloint2double(bits.y, bits.x);
      n.v[1] = __hiloint2double(bits.w, bits.z);
    }
    return n;
  }

  // Rounded once to the row's type.
  __device__ uint4 bits() const {
    if constexpr (Row::kCount == 8) {
      return {Row::pack(v), Row::pack(v + 2), Row::pack(v + 4), Row::pack(v + 6)};
    } else if constexpr (Row::kCount == 4) {
      return {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
              __float_as_uint(v[3])};
    } else {
      return {uint32_t(__double2loint(v[0])), uint32_t(__double2hiint(v[0])),
              uint32_t(__double2loint(v[1])), uint32_t(__double2hiint(v[1]))};
    }
  }

  __device__ void add_row(const uint4& bits) {
    const Numbers other = from(bits);
#pragma unroll
    for (uint32_t i = 0; i < Row::kCount; ++i) v[i] = add(v[i], other.v[i]);
  }

  __device__ void add_row(const uint4& bits, typename Row::Sum factor) {
    const Numbers other = from(bits);
#pragma unroll
    for (uint32_t i = 0; i < Row::kCount; ++i) v[i] = add(v[i], multiply(other.v[i], factor));
  }
};

}  // namespace dualpipe
