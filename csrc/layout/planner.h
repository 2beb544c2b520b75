// Sizes of a placement plan, and what one CTA of the planner keeps in shared memory.
//
// A CTA plans one problem: one layer's share of one node, in which the node's experts are numbered
// by position, 0 to experts_per_node() - 1, and its replicas ("items") in the order they are made.
#pragma once

#include <cstdint>

#include "layout/carver.h"

namespace dualpipe {

// Limits of the planner kernel. One warp keeps what it searches in registers: 32 experts or 16
// GPUs in each lane.
inline constexpr uint32_t kMaxPlannerExperts = 1024;
inline constexpr uint32_t kMaxPlannerSlots = 2048;
inline constexpr uint32_t kMaxPlannerGpus = 512;

// Each divides as plan.py says; groups and nodes are 1 for a global plan.
struct PlannerSizes {
  uint32_t num_layers = 0;
  uint32_t num_experts = 0;
  uint32_t num_slots = 0;
  uint32_t num_groups = 0;
  uint32_t num_nodes = 0;
  uint32_t num_gpus = 0;

  DUALPIPE_HD constexpr uint32_t experts_per_node() const { return num_experts / num_nodes; }
  DUALPIPE_HD constexpr uint32_t slots_per_node() const { return num_slots / num_nodes; }
  DUALPIPE_HD constexpr uint32_t gpus_per_node() const { return num_gpus / num_nodes; }
  DUALPIPE_HD constexpr uint32_t groups_per_node() const { return num_groups / num_nodes; }
  DUALPIPE_HD constexpr uint32_t experts_per_group() const { return num_experts / num_groups; }
};

struct PlannerLayout {
  Region<uint64_t> keys;           // [n] to sort, n the larger of groups and items
  Region<uint64_t> other_keys;     // [n] what sorting writes in turn
  Region<uint16_t> places;         // [n] where packing puts them
  Region<float> loads;             // [E] of all experts; at the end [E/N] of the node's
  Region<uint16_t> groups;         // [g/N] the node's groups
  Region<uint16_t> experts;        // [E/N] the expert at each position
  Region<uint16_t> counts;         // [E/N] replicas of each
  Region<uint16_t> item_position;  // [S/N] whose replica an item is
  Region<uint16_t> item_number;    // [S/N] and which one of its expert, from 0
  uint64_t bytes = 0;
};

DUALPIPE_HD constexpr PlannerLayout make_planner_layout(const PlannerSizes& sizes) {
  const uint64_t items = sizes.slots_per_node();
  const uint64_t sorted = items > sizes.num_groups ? items : sizes.num_groups;
  Carver carver;
  PlannerLayout layout;
  layout.keys = carver.take<uint64_t>(sorted);
  layout.other_keys = carver.take<uint64_t>(sorted);
  layout.places = carver.take<uint16_t>(sorted);
  layout.loads = carver.take<float>(sizes.num_experts);
  layout.groups = carver.take<uint16_t>(sizes.groups_per_node());
  layout.experts = carver.take<uint16_t>(sizes.experts_per_node());
  layout.counts = carver.take<uint16_t>(sizes.experts_per_node());
  layout.item_position = carver.take<uint16_t>(items);
  layout.item_number = carver.take<uint16_t>(items);
  layout.bytes = carver.bytes();
  return layout;
}

// Every region is largest when there is one node.
inline constexpr uint64_t kMaxPlannerBytes =
    make_planner_layout(
        {1, kMaxPlannerExperts, kMaxPlannerSlots, kMaxPlannerExperts, 1, kMaxPlannerGpus})
        .bytes;
static_assert(kMaxPlannerBytes <= 72 * 1024);  // three CTAs on an SM

}  // namespace dualpipe
