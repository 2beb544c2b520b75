// One warp's pipeline through shared memory: bulk loads run ahead into a ring of stages, bulk
// stores follow, and a stage is filled again as soon as its stores have read it.
#pragma once

#include <cstdint>

#include "ep/stage_layout.h"
#include "ptx/bulk.cuh"

namespace dualpipe {

class Ring {
 public:
  __device__ Ring(uint8_t* memory, uint64_t* full, const StageLayout& layout, uint32_t num_stages)
      : memory_(memory), full_(full), layout_(layout), num_stages_(num_stages) {}

  // Once, by the whole warp, before anything else.
  __device__ void init() {
    if (threadIdx.x % 32 == 0) {
      for (uint32_t i = 0; i < num_stages_; ++i) ptx::mbarrier_init(&full_[i], 1);
      ptx::fence_mbarrier_init();
    }
    __syncwarp();
  }

  __device__ uint32_t num_stages() const { return num_stages_; }
  __device__ uint8_t* piece(uint32_t stage) const { return memory_ + stage * layout_.bytes(); }
  __device__ uint8_t* extra(uint32_t stage) const { return piece(stage) + layout_.extra_offset(); }
  __device__ uint64_t* full(uint32_t stage) const { return &full_[stage]; }

  // Local copies always come to an end: no peer can hold them up.
  __device__ void wait_full(uint32_t stage, uint32_t parity) const {
    while (!ptx::mbarrier_try_wait_parity(&full_[stage], parity)) {
    }
  }

 private:
  uint8_t* memory_;
  uint64_t* full_;
  StageLayout layout_;
  uint32_t num_stages_;
};

// Drives a ring with what a `Work` lists. All lanes of a warp call it together. A Work offers, each
// called by the whole warp:
//   bool load(ring, stage)   starts the loads of the next step into the stage; false if it cannot
//                            yet, or if there are no more steps
//   void store(ring, stage)  starts the stores of the oldest step that is loaded and not stored
//   bool wait()              called when nothing is in flight: waits until load() may succeed;
//                            false at the end, or if the rank has failed
// Every step's stores are one bulk group of each lane.
//
// Stage reuse: with step i stored and committed, wait_group.read<1> tells that the bulk stores of
// step i - 1 have read their stage, so step i - 1 + num_stages may be loaded there; __syncwarp
// brings the ordinary reads of all lanes before that load. A Work that writes to a stage by
// ordinary stores fences them itself, before its bulk stores. There is no proxy fence here for the
// reads: none is needed before a bulk load overwrites what was read, and it would wait for the
// ordinary stores to global memory that are under way, a microsecond a step (measured: twice the
// time of a dispatch).
template <class Work>
__device__ void pump(Ring& ring, Work& work) {
  uint32_t issued = 0, done = 0;             // steps
  uint32_t load_stage = 0, store_stage = 0;  // their stages
  uint32_t parity = 0;                       // of store_stage
  const uint32_t stages = ring.num_stages();
  for (;;) {
    while (issued - done + 1 < stages && work.load(ring, load_stage)) {
      ++issued;
      load_stage = load_stage + 1 == stages ? 0 : load_stage + 1;
    }
    if (issued == done) {
      if (!work.wait()) break;
      continue;
    }
    ring.wait_full(store_stage, parity);
    work.store(ring, store_stage);
    ptx::bulk_commit_group();
    ptx::bulk_wait_group_read<1>();
    __syncwarp();
    ++done;
    store_stage = store_stage + 1 == stages ? 0 : store_stage + 1;
    parity ^= store_stage == 0 ? 1 : 0;
  }
  ptx::bulk_wait_group<0>();
}

// A flag tells that a run of steps has arrived. It is sent this many steps into the next run: late
// enough for the wait for the run's stores to cost little, early enough for the receiver not to
// stand idle. (A whole run later, the first rows of a quantising dispatch were told 90 us after it
// began.)
inline constexpr uint32_t kStepsBeforeFlag = 2;

// bulk_wait_group for a number that is known at run time; more than 16 counts as 16, which waits
// for more than asked.
__device__ inline void bulk_wait_group_at_most(uint32_t pending) {
  switch (min(pending, 16u)) {
    case 16:
      return ptx::bulk_wait_group<16>();
    case 15:
      return ptx::bulk_wait_group<15>();
    case 14:
      return ptx::bulk_wait_group<14>();
    case 13:
      return ptx::bulk_wait_group<13>();
    case 12:
      return ptx::bulk_wait_group<12>();
    case 11:
      return ptx::bulk_wait_group<11>();
    case 10:
      return ptx::bulk_wait_group<10>();
    case 9:
      return ptx::bulk_wait_group<9>();
    case 8:
      return ptx::bulk_wait_group<8>();
    case 7:
      return ptx::bulk_wait_group<7>();
    case 6:
      return ptx::bulk_wait_group<6>();
    case 5:
      return ptx::bulk_wait_group<5>();
    case 4:
      return ptx::bulk_wait_group<4>();
    case 3:
      return ptx::bulk_wait_group<3>();
    case 2:
      return ptx::bulk_wait_group<2>();
    case 1:
      return ptx::bulk_wait_group<1>();
    default:
      return ptx::bulk_wait_group<0>();
  }
}

}  // namespace dualpipe
