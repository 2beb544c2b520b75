// Where every rank's workspace is, as seen from this GPU.
#pragma once

#include <cstdint>
#include <type_traits>

namespace dualpipe {

// Ranks that reach each other by load and store. Kernels receive the table by value, so it sits in
// constant memory and looking up a peer costs no trip to global memory.
inline constexpr uint32_t kMaxRanks = 64;

// Ranks may be processes with a GPU each, or virtual ranks on one GPU: kernels cannot tell.
struct PeerTable {
  uint32_t num_ranks = 0;
  uint64_t bytes = 0;  // of each rank's workspace
  uint8_t* base[kMaxRanks] = {};
};

static_assert(std::is_trivially_copyable_v<PeerTable>, "kernel parameters are copied as bytes");
static_assert(sizeof(PeerTable) <= 1024, "kernel parameters share 4 KiB");

}  // namespace dualpipe
