// Host side of the barrier kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "comm/error_record.h"
#include "comm/peer_table.h"
#include "layout/workspace.h"

namespace dualpipe {

struct BarrierArgs {
  PeerTable peers;
  ControlLayout control;
  ErrorRecord* records;  // [num_local], host-mapped
  uint64_t timeout_ns;
  uint32_t first_rank;  // CTA i acts for rank first_rank + i
  uint32_t num_local;   // ranks that this launch acts for: 1, or several virtual ones
};

// Enqueues the barrier on `stream` of the current device; does not wait.
cudaError_t launch_barrier(const BarrierArgs& args, cudaStream_t stream);

}  // namespace dualpipe
