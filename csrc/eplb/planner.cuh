// The planner for one problem by one CTA: a layer's share of one node.
//
// Cycles, estimated for 256 experts (1.7 GHz; a round of a serial loop is one dependent chain: a
// tree over registers, redux, ballot, select, and for a replica an IEEE division):
//
//   layers                              58             58             58             61
//   slots / nodes / GPUs      288 / 4 / 32  288 / - / 144  576 / - / 288  320 / - / 320
//   load, sum groups                 1,500          1,000          1,000          1,000
//   groups to nodes           800 + 4 x 70              -              -              -
//   replicate                      8 x 130       32 x 140      320 x 140       64 x 140
//   sort                             1,200          2,500          4,500              -
//   pack                           64 x 70          1,000          1,500              -
//   write                            1,000          1,000          2,000          1,000
//   microseconds                         6              6             32              6
#pragma once

#include <cstdint>

#include "eplb/order.cuh"
#include "eplb/pack.cuh"
#include "eplb/planner.h"
#include "eplb/replicate.cuh"

namespace dualpipe {

// What the CTA plans, and where it keeps it.
struct Problem {
  const PlannerArgs& args;
  uint8_t* shared;
  uint32_t layer;
  uint32_t node;

  template <class T>
  __device__ __forceinline__ T* at(const Region<T>& region) const {
    return region.in(shared);
  }
};

// Loads as the kernel uses them. Written so that NaN fails every comparison; -0 becomes 0, whose
// bits compare as a load's do.
__device__ __forceinline__ float usable_load(float load, float most) {
  return load > 0.0f ? fminf(load, most) : 0.0f;
}

__device__ __forceinline__ float read_load(const Problem& problem, uint32_t expert, bool& suspect) {
  const PlannerArgs& args = problem.args;
  const float load =
      args.loads[static_cast<size_t>(problem.layer) * args.sizes.num_experts + expert];
  if (!(load >= 0.0f && load <= args.suspect_load)) suspect = true;
  return usable_load(load, args.max_load);
}

// Packs whole groups onto nodes and keeps the groups of this CTA's node. Every CTA of a layer does
// this again: cheaper than telling each other. Ends with a CTA barrier.
__device__ __forceinline__ void assign_groups(const Problem& problem, bool& suspect) {
  const PlannerArgs& args = problem.args;
  const PlannerSizes& sizes = args.sizes;
  uint16_t* const groups = problem.at(args.layout.groups);
  if (sizes.num_groups == sizes.num_nodes) {
    if (threadIdx.x == 0) groups[0] = static_cast<uint16_t>(problem.node);
    __syncthreads();
    return;
  }
  float* const loads = problem.at(args.layout.loads);
  for (uint32_t expert = threadIdx.x; expert < sizes.num_experts; expert += blockDim.x) {
    loads[expert] = read_load(problem, expert, suspect);
  }
  __syncthreads();
  uint64_t* keys = problem.at(args.layout.keys);
  const uint32_t size = sizes.experts_per_group();
  for (uint32_t group = threadIdx.x; group < sizes.num_groups; group += blockDim.x) {
    // One addition at a time, in the order of the experts: the order is part of the result.
    float sum = loads[group * size];
    for (uint32_t i = 1; i < size; ++i) sum = __fadd_rn(sum, loads[group * size + i]);
    keys[group] = load_key(sum, group);
  }
  __syncthreads();
  uint16_t* const places = problem.at(args.layout.places);
  keys = sort_keys(keys, problem.at(args.layout.other_keys), sizes.num_groups);
  pack_items(keys, places, sizes.num_groups, sizes.num_nodes);
  __syncthreads();
  const uint32_t room = sizes.groups_per_node();
  for (uint32_t i = threadIdx.x; i < sizes.num_groups; i += blockDim.x) {
    const uint32_t place = places[i];
    if (place / room == problem.node) {
      groups[place % room] = static_cast<uint16_t>(key_index(keys[i]));
    }
  }
  __syncthreads();
}

// Numbers the node's experts by position and gives each its first replica. Ends with a CTA barrier.
__device__ __forceinline__ void number_experts(const Problem& problem, bool& suspect) {
  const PlannerArgs& args = problem.args;
  const uint32_t size = args.sizes.experts_per_group();
  const uint16_t* const groups = problem.at(args.layout.groups);
  const uint32_t num_experts = args.sizes.experts_per_node();
  for (uint32_t position = threadIdx.x; position < num_experts; position += blockDim.x) {
    const uint32_t expert = groups[position / size] * size + position % size;
    problem.at(args.layout.experts)[position] = static_cast<uint16_t>(expert);
    // Read again rather than moved: another thread may still need what lies there.
    problem.at(args.layout.loads)[position] = read_load(problem, expert, suspect);
    problem.at(args.layout.counts)[position] = 1;
    problem.at(args.layout.item_position)[position] = static_cast<uint16_t>(position);
    problem.at(args.layout.item_number)[position] = 0;
  }
  __syncthreads();
}

// Fills the node's rows of log2phy with -1, by all warps but the first.
__device__ __forceinline__ void clear_log2phy(const Problem& problem) {
  const PlannerArgs& args = problem.args;
  if (args.log2phy == nullptr) return;
  const uint16_t* const experts = problem.at(args.layout.experts);
  const uint32_t num_warps = blockDim.x / kWarpSize - 1;
  const uint32_t num_experts = args.sizes.experts_per_node();
  const size_t first_row = static_cast<size_t>(problem.layer) * args.sizes.num_experts;
  for (uint32_t p = threadIdx.x / kWarpSize - 1; p < num_experts; p += num_warps) {
    int64_t* const row = args.log2phy + (first_row + experts[p]) * args.width;
    for (uint32_t x = threadIdx.x % kWarpSize; x < args.width; x += kWarpSize) row[x] = -1;
  }
}

// Packs the items onto the node's GPUs. Returns the sorted keys; their places are in shared memory.
// Begins after and ends with a CTA barrier.
__device__ __forceinline__ const uint64_t* place_items(const Problem& problem) {
  const PlannerArgs& args = problem.args;
  const uint32_t num_items = args.sizes.slots_per_node();
  const uint32_t num_gpus = args.sizes.gpus_per_node();
  const uint16_t* const item_position = problem.at(args.layout.item_position);
  const uint16_t* const counts = problem.at(args.layout.counts);
  const float* const loads = problem.at(args.layout.loads);
  uint64_t* keys = problem.at(args.layout.keys);
  uint16_t* const places = problem.at(args.layout.places);
  for (uint32_t item = threadIdx.x; item < num_items; item += blockDim.x) {
    const uint32_t position = item_position[item];
    keys[item] = load_key(__fdiv_rn(loads[position], static_cast<float>(counts[position])), item);
    places[item] = static_cast<uint16_t>(item);
  }
  __syncthreads();
  if (num_items == num_gpus) return keys;  // item i on GPU i, whatever the loads
  keys = sort_keys(keys, problem.at(args.layout.other_keys), num_items);
  pack_items(keys, places, num_items, num_gpus);
  __syncthreads();
  return keys;
}

// Returns the most replicas of an expert that this thread saw.
__device__ __forceinline__ uint32_t write_maps(const Problem& problem, const uint64_t* keys) {
  const PlannerArgs& args = problem.args;
  const PlannerSizes& sizes = args.sizes;
  const uint32_t num_items = sizes.slots_per_node();
  const uint32_t first_slot = problem.node * num_items;
  const size_t first_row = static_cast<size_t>(problem.layer) * sizes.num_experts;
  const size_t first_column = static_cast<size_t>(problem.layer) * sizes.num_slots + first_slot;
  const uint16_t* const places = problem.at(args.layout.places);
  const uint16_t* const experts = problem.at(args.layout.experts);
  for (uint32_t i = threadIdx.x; i < num_items; i += blockDim.x) {
    const uint32_t item = key_index(keys[i]);
    const uint32_t place = places[i];
    const uint32_t expert = experts[problem.at(args.layout.item_position)[item]];
    const uint32_t number = problem.at(args.layout.item_number)[item];
    args.phy2log[first_column + place] = expert;
    if (args.replica != nullptr) args.replica[first_column + place] = number;
    if (args.log2phy != nullptr && number < args.width) {
      args.log2phy[(first_row + expert) * args.width + number] = first_slot + place;
    }
  }
  uint32_t most = 0;
  for (uint32_t p = threadIdx.x; p < sizes.experts_per_node(); p += blockDim.x) {
    const uint32_t count = problem.at(args.layout.counts)[p];
    args.logcnt[first_row + experts[p]] = count;
    most = max(most, count);
  }
  return most;
}

// The whole CTA; `most_replicas` is a word of shared memory besides those of the layout.
__device__ __forceinline__ void plan_problem(const PlannerArgs& args, uint8_t* shared,
                                             uint32_t* most_replicas) {
  const uint32_t num_nodes = args.sizes.num_nodes;
  const Problem problem{args, shared, blockIdx.x / num_nodes, blockIdx.x % num_nodes};
  if (threadIdx.x == 0) *most_replicas = 0;

  bool suspect = false;
  assign_groups(problem, suspect);
  number_experts(problem, suspect);
  if (threadIdx.x < kWarpSize) {
    replicate({problem.at(args.layout.loads), problem.at(args.layout.counts),
               problem.at(args.layout.item_position), problem.at(args.layout.item_number),
               args.sizes.experts_per_node(), args.sizes.slots_per_node()});
  } else {
    clear_log2phy(problem);
  }
  // Orders the replicas before their use, and -1 in log2phy before the slots that replace it.
  __syncthreads();
  const uint64_t* const keys = place_items(problem);
  atomicMax(most_replicas, write_maps(problem, keys));
  suspect = __syncthreads_or(suspect);
  if (threadIdx.x == 0) {
    const int32_t most = static_cast<int32_t>(*most_replicas);
    args.status[blockIdx.x] = suspect ? -most : most;
  }
}

}  // namespace dualpipe
