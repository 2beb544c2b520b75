// bench/push.h: the memory that rows are pushed into, and how many stages fit an SM.
#include "bench/push.h"

#include <cstdint>

#include "check.h"

using namespace dualpipe;

namespace {

constexpr PushLayout kLayout = make_push_layout(2 * 4096, 14336);
static_assert(kLayout.state.offset == 0);
static_assert(kLayout.rows.offset == sizeof(ControlState));
static_assert(kLayout.row_pitch == 14336);
static_assert(kLayout.bytes == sizeof(ControlState) + 2ull * 4096 * 14336);

// FP8 values and scales: rows begin at whole lines.
static_assert(make_push_layout(3, 7392).row_pitch == 7424);
static_assert(make_push_layout(3, 7392).bytes == sizeof(ControlState) + 3 * 7424);

// Two whole rows of 14 KiB for each of eight warps, four for each of four; never more than four.
static_assert(push_stages(8, 14336, 8) == 2);
static_assert(push_stages(4, 14336, 8) == 4);
static_assert(push_stages(4, 7168, 8) == kMostPushStages);
static_assert(push_stages(16, 14336, 8) < 2);

void sizes_that_do_not_fit() {
  CHECK(make_push_layout(UINT64_C(1) << 60, 14336).bytes == 0);
  CHECK(make_push_layout(1, UINT64_MAX).bytes == 0);
  CHECK(push_stages(0, 14336, 8) == 0);
  CHECK(push_stages(4, UINT32_MAX, 8) == 0);
}

void stages_fit_their_memory() {
  for (uint32_t warps = 1; warps <= kPushThreads / 32; ++warps) {
    for (uint32_t piece = 16; piece <= 32768; piece += 16) {
      for (const uint32_t ranks : {2u, 8u, 64u}) {
        const uint64_t each = push_stage(piece, ranks).bytes() + sizeof(uint64_t);
        const uint64_t taken = each * warps * push_stages(warps, piece, ranks);
        CHECK(taken <= kPushSharedBytes);
        CHECK(push_stage(piece, ranks).extra_offset() >= piece);
        CHECK(push_stage(piece, ranks).bytes() >= piece + 4 * ranks);
      }
    }
  }
}

}  // namespace

int main() {
  sizes_that_do_not_fit();
  stages_fit_their_memory();
}
