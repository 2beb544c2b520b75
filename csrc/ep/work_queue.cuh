// How the warps of a role share its work: each takes the next piece when it is free. SMs do not run
// equally fast beside each other, and what waits for the link waits unequally long; with fixed
// shares the last warp of a dispatch ended 60 us after the first (measured). Results do not depend
// on who does what.
#pragma once

#include <cstdint>

#include "layout/workspace.h"

namespace dualpipe {

// One warp's view of a queue. Its first piece is its own number, which costs nothing; the others
// come from a counter in the rank's state, which is zero when the first kernel of a transfer
// starts. The counter's answer takes most of a microsecond, so it is asked some time before.
class WorkQueue {
 public:
  __device__ WorkQueue(ControlState* state, Queue queue, uint32_t warp, uint32_t warps)
      : taken_(&state->taken[static_cast<uint32_t>(queue)]), warps_(warps), next_(warp) {}

  // For a warp that comes from other work and has no piece of its own.
  __device__ static WorkQueue joined(ControlState* state, Queue queue, uint32_t warps) {
    WorkQueue work(state, queue, 0, warps);
    work.ask();
    return work;
  }

  // Asks for the next piece; to be followed by take().
  __device__ void ask() {
    if (threadIdx.x % 32 == 0) next_ = warps_ + atomicAdd(taken_, 1u);
  }

  // The piece that was asked for last; at the first call, the warp's own. May be beyond the end.
  __device__ uint32_t take() const { return __shfl_sync(~0u, next_, 0); }

 private:
  uint32_t* const taken_;
  const uint32_t warps_;
  uint32_t next_;  // in lane 0
};

}  // namespace dualpipe
