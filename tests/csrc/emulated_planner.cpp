// The planner kernel's own source as a shared library for the CPU; see test_planner.py.
// The emulator, and first: the sources below expect the compiler to know CUDA's language.
#include <cuda_runtime_api.h>

#include <vector>

#include "eplb/planner.cuh"

using namespace dualpipe;

namespace {

constexpr uint8_t kGarbage = 0xa5;
constexpr size_t kGuardBytes = 256;

}  // namespace

// Plans every layer; returns 0, or 1 if the kernel wrote behind its shared memory. Sizes are
// layers, experts, slots, groups, nodes, GPUs.
extern "C" int plan(const uint32_t sizes[6], const float* loads, float max_load, float suspect_load,
                    uint32_t width, uint32_t num_threads, uint64_t seed, int64_t* phy2log,
                    int64_t* replica, int64_t* log2phy, int64_t* logcnt, int32_t* status) {
  PlannerArgs args{};
  args.sizes = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
  args.layout = make_planner_layout(args.sizes);
  args.loads = loads;
  args.max_load = max_load;
  args.suspect_load = suspect_load;
  args.width = width;
  args.phy2log = phy2log;
  args.replica = replica;
  args.log2phy = log2phy;
  args.logcnt = logcnt;
  args.status = status;
  std::vector<uint64_t> memory((args.layout.bytes + kGuardBytes) / sizeof(uint64_t));
  uint8_t* const shared = reinterpret_cast<uint8_t*>(memory.data());
  for (uint32_t block = 0; block < args.sizes.num_layers * args.sizes.num_nodes; ++block) {
    std::memset(shared, kGarbage, args.layout.bytes + kGuardBytes);
    uint32_t most_replicas = kGarbage;
    blockIdx.x = block;
    emulator::Block(num_threads, seed + block + 1, [&] {
      plan_problem(args, shared, &most_replicas);
    }).run();
    for (size_t i = 0; i < kGuardBytes; ++i) {
      if (shared[args.layout.bytes + i] != kGarbage) return 1;
    }
  }
  return 0;
}
