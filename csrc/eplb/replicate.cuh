// Replication: one slot after the other to the expert whose replicas carry most, the lowest one on
// a tie.
#pragma once

#include <cstdint>

#include "eplb/order.cuh"

namespace dualpipe {

// The experts of one problem by position, and the replicas made of them.
struct Replicas {
  const float* loads;       // [num_experts]
  uint16_t* counts;         // [num_experts] 1 to begin with
  uint16_t* item_position;  // [num_items] the first num_experts are there
  uint16_t* item_number;    // [num_items]
  uint32_t num_experts;
  uint32_t num_items;
};

// By one warp. Lane l holds experts l * kExperts to l * kExperts + kExperts - 1, their shares
// (load / replicas) in registers.
//
// A round is one dependent chain: the lane's largest share (a tree), the warp's (redux), who holds
// it (ballot), the update. Its successor, an IEEE division, is computed by every lane for its own
// largest while the warp's is under way. Lanes without experts hold zero shares: they never win, as
// the lowest lane wins a tie. A lane reads and writes only its own counts.
template <uint32_t kExperts>
__device__ __forceinline__ void replicate_one_by_one(const Replicas& r) {
  const uint32_t lane = threadIdx.x % kWarpSize;
  const bool has_experts = lane * kExperts < r.num_experts;
  uint32_t share[kExperts];  // bits of the float
#pragma unroll
  for (uint32_t p = 0; p < kExperts; ++p) {
    const uint32_t position = lane * kExperts + p;
    share[p] = position < r.num_experts ? __float_as_uint(r.loads[position]) : 0;
  }
  for (uint32_t item = r.num_experts; item < r.num_items; ++item) {
    uint32_t most[kExperts], which[kExperts];
#pragma unroll
    for (uint32_t p = 0; p < kExperts; ++p) {
      most[p] = share[p];
      which[p] = p;
    }
#pragma unroll
    for (uint32_t step = 1; step < kExperts; step *= 2) {
#pragma unroll
      for (uint32_t p = 0; p + step < kExperts; p += 2 * step) {
        const bool right = most[p + step] > most[p];
        most[p] = right ? most[p + step] : most[p];
        which[p] = right ? which[p + step] : which[p];
      }
    }
    const uint32_t largest = __reduce_max_sync(kAllLanes, most[0]);
    const uint32_t position = lane * kExperts + which[0];
    const uint32_t count = has_experts ? r.counts[position] : 1;
    const float load = has_experts ? r.loads[position] : 0.0f;
    const uint32_t after = __float_as_uint(__fdiv_rn(load, static_cast<float>(count + 1)));
    const uint32_t holders = __ballot_sync(kAllLanes, most[0] == largest);
    const bool mine = lane == static_cast<uint32_t>(__ffs(holders)) - 1;
    if (mine) {
      r.item_position[item] = static_cast<uint16_t>(position);
      r.item_number[item] = static_cast<uint16_t>(count);
      r.counts[position] = static_cast<uint16_t>(count + 1);
    }
#pragma unroll
    for (uint32_t p = 0; p < kExperts; ++p) {
      share[p] = mine && which[0] == p ? after : share[p];
    }
  }
}

// By one warp; needs a CTA barrier before and after.
__device__ __forceinline__ void replicate(const Replicas& replicas) {
  if (replicas.num_experts <= 2 * kWarpSize) {
    replicate_one_by_one<2>(replicas);
  } else if (replicas.num_experts <= 8 * kWarpSize) {
    replicate_one_by_one<8>(replicas);
  } else {
    replicate_one_by_one<32>(replicas);
  }
}

}  // namespace dualpipe
