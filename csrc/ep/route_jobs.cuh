// What the CTAs of a route do once every rank has every token's experts: rows that this rank's
// tokens get elsewhere, and rows and places of what it receives. See route.cu for the protocol.
#pragma once

#include <cstdint>

#include "ep/router.cuh"
#include "ep/scan.cuh"

namespace dualpipe {

// Of a token.
inline constexpr uint32_t kMostChoices = 32;

// 3a. Rows of the tokens of part `part` at each rank: those of lower ranks and of earlier parts
// come first. `next` and `first` are [R], `in_warp` [kRouteWarps, R]; all shared.
__device__ inline void send_job(const Router& r, uint32_t part, int32_t* next, int32_t* first,
                                int32_t* in_warp) {
  const uint32_t num_ranks = r.num_ranks();
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x < num_ranks) {
    int32_t before = 0;
    for (uint32_t i = 0; i < r.index(r.me, part); ++i) {
      if (i == r.index(r.me, 0)) first[threadIdx.x] = before;
      before += r.sent(i, threadIdx.x);
    }
    if (part == 0) first[threadIdx.x] = before;
    next[threadIdx.x] = before;
  }
  const uint32_t size = part_tokens(r.call.num_tokens, r.parts());
  const uint32_t end = min((part + 1) * size, r.call.num_tokens);
  const uint32_t unit = unit_rows(static_cast<uint32_t>(r.launch.layout.shape.max_tokens));
  for (uint32_t t0 = part * size; t0 < end; t0 += kRouteThreads) {
    const uint32_t t = t0 + threadIdx.x;
    uint64_t goes_to = 0;
    for (uint32_t k0 = 0; t < end && k0 < r.id_pitch(); k0 += 8) {
      const auto ids = EightIds::at(r.ids(r.me, r.me) + uint64_t{t} * r.id_pitch() + k0);
#pragma unroll
      for (uint32_t j = 0; j < 8; ++j) {
        if (ids[j] >= 0) goes_to |= uint64_t{1} << r.owner(ids[j]);
      }
    }
    for (uint32_t to = 0; to < num_ranks; ++to) {
      const uint32_t votes = __ballot_sync(~0u, (goes_to >> to) & 1);
      if (lane == 0) in_warp[warp * num_ranks + to] = __popc(votes);
    }
    __syncthreads();
    if (threadIdx.x < num_ranks) {
      next[threadIdx.x] =
          running_sum(in_warp + threadIdx.x, kRouteWarps, num_ranks, next[threadIdx.x]);
    }
    __syncthreads();
    for (uint32_t to = 0; to < num_ranks; ++to) {
      const uint32_t votes = __ballot_sync(~0u, (goes_to >> to) & 1);
      const int32_t row = in_warp[warp * num_ranks + to] + __popc(votes & lanes_below(lane));
      const bool goes = (goes_to >> to) & 1;
      if (t < end) r.call.slots[uint64_t{t} * num_ranks + to] = goes ? row : -1;
      const uint32_t i = row - first[to];
      if (goes && r.call.unit_tokens != nullptr && i % unit == 0) {
        r.call.unit_tokens[i / unit * num_ranks + to] = t;
      }
    }
    __syncthreads();
  }
}

// Shared memory of a receive job.
struct ReceiveScratch {
  int32_t* next;  // [G]          row that the next choice of each expert gets
  int32_t*
      per_warp;  // [kRouteWarps, G]  what each warp of a tile has of each; first the group ends
  int32_t* token_row;  // [kRouteThreads]   row of each token of the tile, -1 for none
  int32_t* warp_sums;  // [kRouteWarps]
};

// The same where a token names an expert twice.
__device__ inline void place_tile_with_repeats(const Router& r, const ReceiveScratch& s,
                                               const int16_t* ids, uint32_t num_tokens) {
  const uint32_t num_local = r.num_local, top_k = r.top_k();
  const int32_t first = r.me * num_local;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t pitch = static_cast<uint32_t>(r.launch.layout.id_pitch);
  const uint32_t warps = ceil_div(num_tokens, 32);  // that have a token
  int32_t* mine = s.per_warp + warp * num_local;
  for (uint32_t i = threadIdx.x; i < warps * num_local; i += kRouteThreads) s.per_warp[i] = 0;
  __syncthreads();
  // How many of each expert every warp has; a sum, so its order does not matter.
  for (uint32_t k = 0; threadIdx.x < num_tokens && k < top_k; ++k) {
    const uint32_t expert = ids[threadIdx.x * pitch + k] - first;
    if (expert < num_local) atomicAdd(&mine[expert], 1);
  }
  __syncthreads();
  for (uint32_t e = threadIdx.x; e < num_local; e += kRouteThreads) {
    s.next[e] = running_sum(s.per_warp + e, warps, num_local, s.next[e]);
  }
  __syncthreads();
  // A warp walks the choices of its 32 tokens in order, 32 at a time.
  const uint32_t places = round_up(top_k, 4);
  for (uint32_t i = lane; warp < warps && i < 32 * top_k; i += 32) {
    const uint32_t token = warp * 32 + i / top_k, k = i % top_k;
    uint32_t expert = num_local;
    if (token < num_tokens) expert = min(uint32_t(ids[token * pitch + k] - first), num_local);
    const uint32_t same = __match_any_sync(~0u, expert);
    int32_t place = -1;
    if (expert < num_local) place = mine[expert] + __popc(same & lanes_below(lane));
    __syncwarp();
    if (expert < num_local && (same & lanes_below(lane)) == 0) mine[expert] += __popc(same);
    __syncwarp();
    if (token >= num_tokens || s.token_row[token] < 0) continue;
    if (expert < num_local && static_cast<uint64_t>(place) >= r.room_end(expert)) place = -1;
    r.call.positions[uint64_t(s.token_row[token]) * places + k] = place;
  }
}

// Places in the expert layout of the choices of one tile of tokens, in (token, choice) order. A
// thread each: a token's place in an expert's group is the number of those before it that have
// chosen the expert. Of its warp they are bits of a mask.
__device__ inline void place_tile(const Router& r, const ReceiveScratch& s, const int16_t* ids,
                                  uint32_t num_tokens) {
  const uint32_t num_local = r.num_local, pitch = r.id_pitch();
  const uint32_t first = r.me * num_local;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t warps = ceil_div(num_tokens, 32);  // that have a token
  const uint32_t own_pitch = threadIdx.x < num_tokens ? pitch : 0;
  const int16_t* own_ids = ids + uint64_t{threadIdx.x} * pitch;
  auto* masks = reinterpret_cast<uint32_t*>(s.per_warp);
  uint32_t* mine = masks + warp * num_local;
  for (uint32_t i = threadIdx.x; i < warps * num_local; i += kRouteThreads) masks[i] = 0;
  __syncthreads();

  uint32_t twice = 0;
  for (uint32_t k0 = 0; k0 < own_pitch; k0 += 8) {
    const auto eight = EightIds::at(own_ids + k0);
#pragma unroll
    for (uint32_t j = 0; j < 8; ++j) {
      const uint32_t expert = eight[j] - first;
      if (expert < num_local) twice |= atomicOr(&mine[expert], 1u << lane) & 1u << lane;
    }
  }
  if (__syncthreads_or(twice)) return place_tile_with_repeats(r, s, ids, num_tokens);

  // Of the warp, before the masks become the places of its first choices.
  uint32_t before[kMostChoices / 4] = {};  // 8 bits each
#pragma unroll
  for (uint32_t c = 0; c < kMostChoices / 8; ++c) {
    if (8 * c >= own_pitch) break;
    const auto eight = EightIds::at(own_ids + 8 * c);
#pragma unroll
    for (uint32_t j = 0; j < 8; ++j) {
      const uint32_t expert = eight[j] - first;
      if (expert >= num_local) continue;
      before[2 * c + j / 4] |= __popc(mine[expert] & lanes_below(lane)) << (8 * (j % 4));
    }
  }
  __syncthreads();
  for (uint32_t e = threadIdx.x; e < num_local; e += kRouteThreads) {
    int32_t place = s.next[e];
    for (uint32_t w = 0; w < warps; ++w) {
      const uint32_t chosen = __popc(masks[w * num_local + e]);
      s.per_warp[w * num_local + e] = place;
      place += chosen;
    }
    s.next[e] = place;
  }
  __syncthreads();
  const int32_t row = own_pitch != 0 ? s.token_row[threadIdx.x] : -1;
  if (row < 0) return;
  const uint32_t places = round_up(r.top_k(), 4);
  int32_t* out = r.call.positions + uint64_t(row) * places;
#pragma unroll
  for (uint32_t c = 0; c < kMostChoices / 8; ++c) {
    if (8 * c >= own_pitch) break;
    const auto eight = EightIds::at(own_ids + 8 * c);
    alignas(16) int32_t found[8];
#pragma unroll
    for (uint32_t j = 0; j < 8; ++j) {
      const uint32_t expert = eight[j] - first;
      found[j] = -1;
      if (expert >= num_local) continue;
      const int32_t place = static_cast<int32_t>(mine[expert]) +
                            static_cast<int32_t>(before[2 * c + j / 4] >> (8 * (j % 4)) & 0xff);
      if (static_cast<uint64_t>(place) < r.room_end(expert)) found[j] = place;
    }
#pragma unroll
    for (uint32_t j = 0; j < 8; j += 4) {
      if (8 * c + j >= places) break;
      *reinterpret_cast<int4*>(out + 8 * c + j) = *reinterpret_cast<const int4*>(found + j);
    }
  }
}

// Expert layout: where each local expert's group starts for what (source, part) sends, in `next`
// [G], shared. The CTA that asks for the very first part also writes counts and offsets.
__device__ inline void expert_starts(const Router& r, uint32_t source, uint32_t part, int32_t* next,
                                     int32_t* ends, int32_t* warp_sums) {
  const uint32_t num_local = r.num_local, first = r.me * num_local;
  const uint32_t here = r.index(source, part);
  for (uint32_t e = threadIdx.x; e < num_local; e += kRouteThreads) {
    int32_t total = 0, before = 0;
#pragma unroll 4
    for (uint32_t i = 0; i < r.all_parts(); ++i) {
      const int32_t n = r.chosen(i, first + e);
      total += n;
      before += i < here ? n : 0;
    }
    next[e] = before;
    ends[e] = r.group_rows(total);
    if (here == 0) r.call.counts[e] = total;
  }
  __syncthreads();
  block_inclusive_scan<kRouteWarps>(ends, num_local, warp_sums);
  for (uint32_t e = threadIdx.x; e < num_local; e += kRouteThreads) {
    const int32_t start = e == 0 ? 0 : ends[e - 1];
    next[e] += start;
    if (here == 0) {
      // Rows that there is no room for were never written: nobody may be led to them.
      const int64_t room = static_cast<int64_t>(r.room_end(e));
      r.call.offsets[e] = static_cast<int32_t>(max(min(int64_t{ends[e]}, room), int64_t{0}));
      r.call.counts[e] = max(min(r.call.counts[e], room - start), int64_t{0});
    }
  }
  __syncthreads();
}

// Token layout: the experts of a row, as numbers of this rank.
__device__ inline void write_local_ids(const Router& r, const int16_t* ids, int32_t row) {
  const uint32_t top_k = r.top_k(), first = r.me * r.num_local;
  int64_t* out = r.call.topk_local + uint64_t(row) * top_k;
  for (uint32_t k0 = 0; k0 < top_k; k0 += 8) {
    const auto eight = EightIds::at(ids + k0);
#pragma unroll
    for (uint32_t j = 0; j < 8; ++j) {
      const uint32_t expert = eight[j] - first;
      if (k0 + j < top_k) out[k0 + j] = expert < r.num_local ? int64_t{expert} : -1;
    }
  }
}

// 3b. What part `part` of rank `source` sends to this rank.
__device__ inline void receive_job(const Router& r, uint32_t source, uint32_t part,
                                   const ReceiveScratch& s) {
  const uint32_t num_local = r.num_local, first = r.me * num_local, pitch = r.id_pitch();
  const uint32_t num_tokens = r.setting(source, RouteCounts::kTokens);
  const uint64_t max_starts = r.launch.layout.control.runs + 1;
  int32_t* run_starts = r.call.run_starts + source * max_starts;
  const bool expert_layout = r.call.expert_layout != 0;
  if (expert_layout) expert_starts(r, source, part, s.next, s.per_warp, s.warp_sums);

  int32_t before = 0;
  for (uint32_t i = threadIdx.x; i < r.index(source, part); i += kRouteThreads) {
    before += r.sent(i, r.me);
  }
  int32_t row0 = block_sum<kRouteWarps>(before, s.warp_sums);

  const uint32_t run = run_tokens(num_tokens), size = part_tokens(num_tokens, r.parts());
  const uint32_t end = min((part + 1) * size, num_tokens);
  for (uint32_t t0 = part * size; t0 < end; t0 += kRouteThreads) {
    const uint32_t t = t0 + threadIdx.x;
    const int16_t* ids = r.ids(r.me, source) + uint64_t{t0} * pitch;
    bool here = false;
    for (uint32_t k0 = 0; t < end && k0 < pitch; k0 += 8) {
      const auto eight = EightIds::at(ids + threadIdx.x * pitch + k0);
#pragma unroll
      for (uint32_t j = 0; j < 8; ++j) here |= uint32_t(eight[j] - first) < num_local;
    }
    int32_t total;
    const int32_t row = row0 + block_exclusive_count<kRouteWarps>(here, s.warp_sums, &total);
    s.token_row[threadIdx.x] = here ? row : -1;
    if (t < end && t % run == 0) run_starts[t / run] = row;
    if (here && r.call.topk_local != nullptr && uint64_t(row) < r.call.num_rows) {
      write_local_ids(r, ids + threadIdx.x * pitch, row);
    }
    __syncthreads();
    if (expert_layout) place_tile(r, s, ids, min(end - t0, kRouteThreads));
    __syncthreads();
    row0 += total;
  }
  if (part + 1 == r.parts() && threadIdx.x == 0) run_starts[ceil_div(num_tokens, run)] = row0;
}

}  // namespace dualpipe
