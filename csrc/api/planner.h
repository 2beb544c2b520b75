// Checked construction of what the planner kernel takes on trust, and its launch.
#pragma once

#include <cstdint>

#include "eplb/planner.h"

namespace dualpipe {

// Throws std::invalid_argument where sizes do not divide or exceed the kernel's limits.
void check_planner_sizes(const PlannerSizes& sizes);

// Enqueues the planner on a stream of the current device. The sizes are checked and the layout is
// made here; addresses are taken on trust.
void plan_experts(PlannerArgs args, uint64_t stream);

}  // namespace dualpipe
