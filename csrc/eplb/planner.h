// Host side of the planner kernel: DeepSeek's rules for all layers in one launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "layout/planner.h"

namespace dualpipe {

// L layers, E experts, S slots, N nodes. Device memory, contiguous.
struct PlannerArgs {
  PlannerSizes sizes;
  PlannerLayout layout;
  const float* loads;  // [L, E]
  float max_load;      // larger loads count as this; NaN and negative ones as 0
  float suspect_load;  // larger loads, NaN and negative ones are reported in `status`
  uint32_t width;      // X: columns of log2phy; replicas beyond it are left out
  int64_t* phy2log;    // [L, S] the expert in every slot
  int64_t* replica;    // [L, S] which replica of it, from 0 in the order made; may be null
  int64_t* log2phy;    // [L, E, X] the slots of every expert, -1 beyond; may be null
  int64_t* logcnt;     // [L, E] replicas of every expert
  int32_t* status;     // [L, N] most replicas of an expert; its negative if a load was suspect
};

// Enqueues the planner on `stream` of the current device; does not wait.
cudaError_t launch_planner(const PlannerArgs& args, cudaStream_t stream);

}  // namespace dualpipe
