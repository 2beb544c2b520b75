// Host side of the kernels for few tokens, where a call takes as long as its waits.
//
// They take the arguments of dispatch.h and combine.h, and give the same bits (but for a NaN whose
// bits are all set, see messages.cuh). Of the tuning they read nothing: all warps do all. Rows are
// never kept in a slab; slabs 0 and 1 are the inboxes, all bits of which are set wherever nothing
// is on its way.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ep/combine.h"
#include "ep/dispatch.h"

namespace dualpipe {

inline constexpr uint32_t kInboxes = 2;
// What a permit offers: its epoch alone says which inbox.
inline constexpr uint32_t kNoSlab = 0;

// Enqueue one kernel each; do not wait.
cudaError_t launch_low_latency_dispatch(const DispatchArgs& args, cudaStream_t stream);
cudaError_t launch_low_latency_combine(const CombineArgs& args, cudaStream_t stream);

}  // namespace dualpipe
