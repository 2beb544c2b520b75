#include "api/planner.h"

#include <stdexcept>
#include <string>

#include "api/check.h"

namespace dualpipe {
namespace {

void expect(bool condition, const std::string& expected, uint64_t got) {
  if (!condition) {
    throw std::invalid_argument("expected " + expected + ", got " + std::to_string(got));
  }
}

void expect_range(const char* name, uint64_t least, uint64_t most, uint64_t got) {
  expect(got >= least && got <= most,
         std::string(name) + " from " + std::to_string(least) + " to " + std::to_string(most), got);
}

void expect_multiple(const char* name, uint64_t got, const char* of_name, uint64_t of) {
  expect(got % of == 0,
         std::string(name) + " to be a multiple of " + of_name + " (" + std::to_string(of) + ")",
         got);
}

}  // namespace

void check_planner_sizes(const PlannerSizes& sizes) {
  expect_range("num_experts", 1, kMaxPlannerExperts, sizes.num_experts);
  expect_range("num_slots", sizes.num_experts, kMaxPlannerSlots, sizes.num_slots);
  expect_range("num_gpus", 1, kMaxPlannerGpus, sizes.num_gpus);
  expect_range("num_nodes", 1, sizes.num_gpus, sizes.num_nodes);
  expect_range("num_groups", sizes.num_nodes, sizes.num_experts, sizes.num_groups);
  expect_multiple("num_slots", sizes.num_slots, "num_gpus", sizes.num_gpus);
  expect_multiple("num_gpus", sizes.num_gpus, "num_nodes", sizes.num_nodes);
  expect_multiple("num_groups", sizes.num_groups, "num_nodes", sizes.num_nodes);
  expect_multiple("num_experts", sizes.num_experts, "num_groups", sizes.num_groups);
  // A CTA for each node of each layer, all in one dimension of the grid.
  expect_range("num_layers", 1, INT32_MAX / sizes.num_nodes, sizes.num_layers);
}

void plan_experts(PlannerArgs args, uint64_t stream) {
  check_planner_sizes(args.sizes);
  expect(args.loads && args.phy2log && args.logcnt && args.status,
         "addresses of loads, phy2log, logcnt and status", 0);
  args.layout = make_planner_layout(args.sizes);
  check_cuda(launch_planner(args, reinterpret_cast<cudaStream_t>(stream)), "plan_experts");
}

}  // namespace dualpipe
