// Prefix sums of a warp and of a CTA.
#pragma once

#include <cstdint>

namespace dualpipe {

__device__ inline uint32_t lanes_below(uint32_t lane) { return (1u << lane) - 1; }

// Turns `count` numbers that are `stride` apart into the sums of those before them plus `sum`;
// returns the sum of all. One thread.
__device__ inline int32_t running_sum(int32_t* numbers, uint32_t count, uint32_t stride,
                                      int32_t sum) {
  for (uint32_t i = 0; i < count; ++i) {
    const int32_t number = numbers[i * stride];
    numbers[i * stride] = sum;
    sum += number;
  }
  return sum;
}

// Inclusive prefix sum over the lanes of a warp.
__device__ inline int32_t warp_inclusive_scan(int32_t number) {
  const uint32_t lane = threadIdx.x % 32;
  for (uint32_t step = 1; step < 32; step *= 2) {
    const int32_t other = __shfl_up_sync(~0u, number, step);
    if (lane >= step) number += other;
  }
  return number;
}

// Turns `count` numbers in shared memory into their inclusive prefix sums, for all threads.
// `warp_sums` is [kWarps], shared, free again when the call returns.
template <uint32_t kWarps>
__device__ void block_inclusive_scan(int32_t* numbers, uint32_t count, int32_t* warp_sums) {
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int32_t before = 0;
  for (uint32_t i0 = 0; i0 < count; i0 += 32 * kWarps) {
    const uint32_t i = i0 + threadIdx.x;
    const int32_t sum = warp_inclusive_scan(i < count ? numbers[i] : 0);
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    int32_t lower = before;
    for (uint32_t w = 0; w < kWarps; ++w) {
      lower += w < warp ? warp_sums[w] : 0;
      before += warp_sums[w];
    }
    if (i < count) numbers[i] = lower + sum;
    __syncthreads();
  }
}

// Sum of one number per thread, for all threads. `warp_sums` is [kWarps], shared, free again when
// the call returns.
template <uint32_t kWarps>
__device__ int32_t block_sum(int32_t number, int32_t* warp_sums) {
  const int32_t in_warp = __reduce_add_sync(~0u, number);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = in_warp;
  __syncthreads();
  int32_t sum = 0;
  for (uint32_t w = 0; w < kWarps; ++w) sum += warp_sums[w];
  __syncthreads();
  return sum;
}

// How many threads before this one say yes; `*total` of all of them. `warp_sums` as above.
template <uint32_t kWarps>
__device__ int32_t block_exclusive_count(bool yes, int32_t* warp_sums, int32_t* total) {
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t votes = __ballot_sync(~0u, yes);
  if (lane == 0) warp_sums[warp] = __popc(votes);
  __syncthreads();
  int32_t before = 0, sum = 0;
  for (uint32_t w = 0; w < kWarps; ++w) {
    before += w < warp ? warp_sums[w] : 0;
    sum += warp_sums[w];
  }
  __syncthreads();
  *total = sum;
  return before + __popc(votes & lanes_below(lane));
}

}  // namespace dualpipe
