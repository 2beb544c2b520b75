// Packing sorted items into packs of equal size: each into the lightest pack that has room, the
// lowest one on a tie. Pack loads add up in float32 in order of arrival.
#pragma once

#include <cstdint>

#include "eplb/order.cuh"

namespace dualpipe {

// Above every load, the infinite one included: a full pack is chosen by nobody.
inline constexpr uint32_t kFull = 0xffffffffu;

// One item after the other, by one warp; the first `placed` items are in packs 0, 1, ... already.
// Lane l holds packs l * kPacks to l * kPacks + kPacks - 1, so that the lowest lane and the first
// of its packs is the lowest pack.
//
// A round is one dependent chain: the lane's least (a tree over its packs), the warp's least
// (redux), who holds it (ballot), the choice. What the chosen pack becomes is computed by every
// lane for its own least while the warp's is under way.
template <uint32_t kPacks>
__device__ __forceinline__ void pack_one_by_one(const uint64_t* sorted, uint16_t* places,
                                                uint32_t num_items, uint32_t num_packs,
                                                uint32_t placed) {
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t room = num_items / num_packs;
  uint32_t load[kPacks];  // bits of the float
  uint32_t size[kPacks];
#pragma unroll
  for (uint32_t p = 0; p < kPacks; ++p) {
    const uint32_t pack = lane * kPacks + p;
    load[p] = pack < placed ? key_load_bits(sorted[pack]) : pack < num_packs ? 0 : kFull;
    size[p] = pack < placed ? 1 : 0;
  }
  for (uint32_t i = placed; i < num_items; ++i) {
    const float item = __uint_as_float(key_load_bits(sorted[i]));
    uint32_t least[kPacks], held[kPacks], which[kPacks];
#pragma unroll
    for (uint32_t p = 0; p < kPacks; ++p) {
      least[p] = load[p];
      held[p] = size[p];
      which[p] = p;
    }
#pragma unroll
    for (uint32_t step = 1; step < kPacks; step *= 2) {
#pragma unroll
      for (uint32_t p = 0; p + step < kPacks; p += 2 * step) {
        const bool right = least[p + step] < least[p];
        least[p] = right ? least[p + step] : least[p];
        held[p] = right ? held[p + step] : held[p];
        which[p] = right ? which[p + step] : which[p];
      }
    }
    const uint32_t lightest = __reduce_min_sync(kAllLanes, least[0]);
    const uint32_t after = __float_as_uint(__fadd_rn(__uint_as_float(least[0]), item));
    const bool full = held[0] + 1 == room;
    const uint32_t holders = __ballot_sync(kAllLanes, least[0] == lightest);
    const bool mine = lane == static_cast<uint32_t>(__ffs(holders)) - 1;
    if (mine) {
      places[i] = static_cast<uint16_t>((lane * kPacks + which[0]) * room + held[0]);
    }
#pragma unroll
    for (uint32_t p = 0; p < kPacks; ++p) {
      const bool chosen = mine && which[0] == p;
      load[p] = chosen ? (full ? kFull : after) : load[p];
      size[p] += chosen ? 1 : 0;
    }
  }
}

// Two items to a pack, the first num_packs of them with load: item i < num_packs opens pack i, and
// then every item fills the lightest pack for good. So the others go to the packs in ascending
// order of load, the lower pack first among equals: from the end of the sorted order to its start,
// but forward inside a run of equal loads.
__device__ __forceinline__ void pack_pairs(const uint64_t* sorted, uint16_t* places,
                                           uint32_t num_packs) {
  for (uint32_t pack = threadIdx.x; pack < num_packs; pack += blockDim.x) {
    const uint64_t run = sorted[pack] >> 32;
    const uint32_t first = count_below(sorted, num_packs, run << 32);
    const uint32_t end = count_below(sorted, num_packs, (run + 1) << 32);
    places[pack] = static_cast<uint16_t>(2 * pack);
    places[num_packs + (num_packs - end) + (pack - first)] = static_cast<uint16_t>(2 * pack + 1);
  }
}

// For all threads of the CTA, at least two to a pack (num_items > num_packs). `places`[i] becomes
// pack * room + order of arrival of the i-th sorted item. Needs a CTA barrier before and after.
__device__ __forceinline__ void pack_items(const uint64_t* sorted, uint16_t* places,
                                           uint32_t num_items, uint32_t num_packs) {
  const uint32_t room = num_items / num_packs;
  // Items with load open a pack each, in order, as long as there are empty ones: those are lighter
  // than all others. (Without load the pack stays as light as it was.)
  const bool all_have_load = key_load_bits(sorted[num_packs - 1]) != 0;
  const uint32_t placed =
      all_have_load ? num_packs : count_below(sorted, num_packs, static_cast<uint64_t>(~0u) << 32);
  if (all_have_load && room == 2) {
    pack_pairs(sorted, places, num_packs);
    return;
  }
  for (uint32_t i = threadIdx.x; i < placed; i += blockDim.x) {
    places[i] = static_cast<uint16_t>(i * room);
  }
  if (threadIdx.x >= kWarpSize) return;
  if (num_packs <= kWarpSize) {
    pack_one_by_one<1>(sorted, places, num_items, num_packs, placed);
  } else if (num_packs <= 4 * kWarpSize) {
    pack_one_by_one<4>(sorted, places, num_items, num_packs, placed);
  } else {
    pack_one_by_one<16>(sorted, places, num_items, num_packs, placed);
  }
}

}  // namespace dualpipe
