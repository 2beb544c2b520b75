// What the host gives to every communication kernel.
#pragma once

#include <cstdint>

#include "comm/error_record.h"
#include "comm/peer_table.h"
#include "layout/workspace.h"

namespace dualpipe {

// Virtual ranks that one launch can act for.
inline constexpr uint32_t kMaxLocalRanks = 8;

// What all ranks of a launch share. CTAs [i * ctas, (i + 1) * ctas) act for the i-th of them.
struct LaunchArgs {
  PeerTable peers;
  WorkspaceLayout layout;
  ErrorRecord* records;  // [num_local], host-mapped
  uint64_t timeout_ns;
  uint32_t num_local;
  uint32_t ctas;  // of each rank
};

}  // namespace dualpipe
