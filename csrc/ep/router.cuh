// What the CTAs of a route know, and how they find their way in the exchanged arrays. See route.cu
// for the protocol.
#pragma once

#include <cstdint>

#include "comm/launch_args.h"
#include "ep/route.h"
#include "layout/workspace.h"

namespace dualpipe {

inline constexpr uint32_t kRouteThreads = 512;
inline constexpr uint32_t kRouteWarps = kRouteThreads / 32;

// Divides 16-bit numbers by `divisor` with one multiplication: rounded up, the inverse is too large
// by less than 2^-16 of itself, which no such number shows.
class SmallDivider {
 public:
  __device__ explicit SmallDivider(uint32_t divisor)
      : one_(divisor == 1), inverse_((0xffffffffu / divisor) + 1) {}

  __device__ __forceinline__ uint32_t divide(uint32_t number) const {
    return one_ ? number : __umulhi(number, inverse_);
  }

 private:
  const bool one_;
  const uint32_t inverse_;  // 2^32 / divisor, rounded up
};

// Eight expert ids of a token, -1 where there is none.
struct EightIds {
  uint4 bits;

  __device__ static EightIds at(const int16_t* ids) {
    return {*reinterpret_cast<const uint4*>(ids)};
  }
  __device__ __forceinline__ int32_t operator[](uint32_t j) const {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
    const auto word = static_cast<int32_t>(words[j / 2]);
    return j % 2 == 0 ? word << 16 >> 16 : word >> 16;
  }
};

// What one CTA needs to know everywhere; `me` is the rank it acts for.
struct Router {
  const LaunchArgs& launch;
  const RouteCall& call;
  const uint32_t me;
  const uint32_t turn;       // which of the two exchanged arrays
  const uint32_t num_local;  // experts of a rank
  const SmallDivider by_local;

  __device__ Router(const LaunchArgs& launch, const RouteCall& call, uint32_t epoch)
      : launch(launch),
        call(call),
        me(call.rank),
        turn(epoch % 2),
        num_local(num_experts() / num_ranks()),
        by_local(num_local) {}

  // The rank that has an expert.
  __device__ uint32_t owner(uint32_t expert) const { return by_local.divide(expert); }
  __device__ uint32_t id_pitch() const { return static_cast<uint32_t>(launch.layout.id_pitch); }

  // Expert layout, groups of fixed size.
  __device__ bool fixed_groups() const { return call.expert_layout == kExpertGroups; }
  // Rows that the group of an expert with `count` rows takes up.
  __device__ uint32_t group_rows(uint32_t count) const {
    return fixed_groups() ? call.alignment : round_up(count, call.alignment);
  }
  // Row behind the last that local expert `expert` may have.
  __device__ uint64_t room_end(uint32_t expert) const {
    return fixed_groups() ? uint64_t{expert + 1} * call.alignment : call.num_rows;
  }

  __device__ uint32_t num_ranks() const { return launch.peers.num_ranks; }
  __device__ uint32_t parts() const { return launch.layout.parts; }
  __device__ uint32_t top_k() const { return static_cast<uint32_t>(launch.layout.shape.top_k); }
  __device__ uint32_t num_experts() const {
    return static_cast<uint32_t>(launch.layout.shape.num_experts);
  }

  // Ids of rank `source`, in the memory of rank `at`.
  __device__ int16_t* ids(uint32_t at, uint32_t source) const {
    const auto& layout = launch.layout;
    return layout.ids.in(launch.peers.base[at]) +
           (uint64_t{turn} * num_ranks() + source) * layout.shape.max_tokens * layout.id_pitch;
  }
  // Number of a part among those of all ranks; and how many they are.
  __device__ uint32_t index(uint32_t source, uint32_t part) const {
    return source * parts() + part;
  }
  __device__ uint32_t all_parts() const { return num_ranks() * parts(); }
  // What part `index` needs, in the memory of rank `at`.
  __device__ int32_t* counts(uint32_t at, uint32_t index) const {
    const auto& layout = launch.layout;
    const uint64_t row = uint64_t{turn} * all_parts() + index;
    return layout.counts.in(launch.peers.base[at]) + row * layout.count_pitch;
  }
  // Tokens of that part that have an expert on rank `to`; after the exchange.
  __device__ int32_t sent(uint32_t index, uint32_t to) const {
    return counts(me, index)[RouteCounts::kHeader + to];
  }
  // Choices of expert `expert` in that part.
  __device__ int32_t chosen(uint32_t index, uint32_t expert) const {
    return counts(me, index)[RouteCounts::kHeader + num_ranks() + expert];
  }
  __device__ int32_t header(uint32_t index, uint32_t which) const {
    return counts(me, index)[which];
  }
  // What every part of a rank says.
  __device__ int32_t setting(uint32_t source, uint32_t which) const {
    return header(index(source, 0), which);
  }
};

}  // namespace dualpipe
