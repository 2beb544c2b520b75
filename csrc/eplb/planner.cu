// The planner as a kernel: one CTA for each node of each layer.
#include "eplb/planner.h"

#include "eplb/planner.cuh"

namespace dualpipe {
namespace {

// The first warp does what is serial, the others clear log2phy meanwhile; more threads than items
// or experts have nothing to do.
constexpr uint32_t kMinThreads = 128;
constexpr uint32_t kMaxThreads = 512;

// Of dynamic shared memory: a kernel that needs more must ask.
constexpr uint32_t kBytesForAll = 47 * 1024;

uint32_t num_threads(const PlannerSizes& sizes) {
  const uint32_t items = (sizes.slots_per_node() + kWarpSize - 1) / kWarpSize * kWarpSize;
  return items < kMinThreads ? kMinThreads : items > kMaxThreads ? kMaxThreads : items;
}

}  // namespace

__global__ void __launch_bounds__(kMaxThreads)
    planner_kernel(const __grid_constant__ PlannerArgs args) {
  extern __shared__ __align__(kRegionAlignment) uint8_t shared[];
  __shared__ uint32_t most_replicas;
  plan_problem(args, shared, &most_replicas);
}

cudaError_t launch_planner(const PlannerArgs& args, cudaStream_t stream) {
  const uint32_t num_problems = args.sizes.num_layers * args.sizes.num_nodes;
  const uint32_t bytes = static_cast<uint32_t>(args.layout.bytes);
  if (bytes > kBytesForAll) {
    // Always the most, so that a launch from another thread never finds too little allowed.
    const cudaError_t status =
        cudaFuncSetAttribute(planner_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(kMaxPlannerBytes));
    if (status != cudaSuccess) return status;
  }
  planner_kernel<<<num_problems, num_threads(args.sizes), bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace dualpipe
