// Checked construction of what kernels take on trust.
#pragma once

#include <cstdint>
#include <vector>

#include "comm/peer_table.h"
#include "layout/workspace.h"

namespace dualpipe {

// Throws std::invalid_argument where the shape makes no sense or its size does not fit.
WorkspaceLayout checked_layout(const WorkspaceShape& shape);

// Every base is the start of `bytes` bytes of GPU memory, on a multiple of kRegionAlignment.
// Throws std::invalid_argument where one is not.
PeerTable checked_peer_table(const std::vector<uint64_t>& bases, uint64_t bytes);

}  // namespace dualpipe
