// Waiting for a peer: bounded, and with a reason when it fails.
#pragma once

#include <cstdint>

#include "comm/epoch.h"
#include "comm/error_record.h"
#include "layout/workspace.h"
#include "ptx/memory.cuh"
#include "ptx/timer.cuh"

namespace dualpipe {

// What a failed wait reports.
struct WaitSite {
  Phase phase;
  uint32_t rank;
  uint32_t peer;
  uint32_t chunk;
  uint32_t epoch;
};

// Shared by all waits of one rank in one kernel.
struct Watchdog {
  ControlState* state;  // of this rank
  ErrorRecord* record;  // of this rank, in host-mapped memory
  uint64_t started_ns;  // when the kernel began, by ptx::globaltimer_ns: its waits share the time
  uint64_t timeout_ns;
  const PermitLine* permits;  // [R], of this rank
  const int32_t* matrix;  // [R, R], tokens of a rank to another; null where nobody needs permits
  uint32_t num_ranks;

  // True once any thread of this rank has failed, in this kernel or in an earlier one.
  __device__ bool aborted() const { return ptx::ld_relaxed_gpu(&state->abort) != 0; }
  __device__ bool expired() const { return ptx::globaltimer_ns() - started_ns >= timeout_ns; }

  // The first failure of a rank is the one that is told: later ones follow from it.
  __device__ void report(WaitSite site, uint32_t expected, uint32_t seen,
                         ErrorCode code = ErrorCode::kTimeout) const {
    if (atomicCAS(&state->abort, 0u, 1u) != 0u) return;
    if (code == ErrorCode::kTimeout) find_cause(site, seen);
    record->phase = static_cast<uint32_t>(site.phase);
    record->rank = site.rank;
    record->peer = site.peer;
    record->chunk = site.chunk;
    record->expected = expected;
    record->seen = seen;
    record->epoch = site.epoch;
    ptx::st_release_sys(&record->code, static_cast<uint32_t>(code));
  }

  // Rows can be late because of a third rank: their sender waits for the permits of all ranks that
  // it sends to before it sends to any. A rank gives all its permits at once, so one that has not
  // given this rank its own is the one that the sender waits for.
  __device__ void find_cause(WaitSite& site, uint32_t& seen) const {
    const bool for_rows = site.phase == Phase::kDispatchRows || site.phase == Phase::kCombineRows;
    if (!for_rows || matrix == nullptr) return;
    const bool dispatches = site.phase == Phase::kDispatchRows;
    if (!epoch_reached(ptx::ld_relaxed_sys(&permits[site.peer].epoch), site.epoch)) return;
    for (uint32_t rank = 0; rank < num_ranks; ++rank) {
      if (rank == site.rank || rank == site.peer) continue;
      // What goes to a rank in a dispatch comes back from it in a combine.
      const uint32_t from = dispatches ? site.peer : rank, to = dispatches ? rank : site.peer;
      if (matrix[from * num_ranks + to] == 0) continue;
      const uint32_t given = ptx::ld_relaxed_sys(&permits[rank].epoch);
      if (epoch_reached(given, site.epoch)) continue;
      site.phase = dispatches ? Phase::kDispatchPermit : Phase::kCombinePermit;
      site.peer = rank;
      site.chunk = 0;
      seen = given;
      return;
    }
  }

  // Looked at now and then while waiting: true ends the wait, and the reason is recorded.
  __device__ bool gives_up(const WaitSite& site, uint32_t expected, uint32_t seen) const {
    if (aborted()) return true;
    if (!expired()) return false;
    report(site, expected, seen);
    return true;
  }
};

// Polls between two looks at the clock and the abort word. A poll of a local flag takes about half
// a microsecond, so a time-out is noticed within a fraction of a millisecond.
inline constexpr uint32_t kPollsPerCheck = 256;

// Waits until `*flag` has come to `expected`, or until the watchdog ends it.
//
// True: what the peer wrote before it released the flag is visible to this thread's later accesses.
// False: the rank has failed and the reason is recorded; the caller returns without touching what
// it waited for. Other threads of the CTA learn of either only through a CTA barrier.
__device__ inline bool wait_epoch(const uint32_t* flag, uint32_t expected, const WaitSite& site,
                                  const Watchdog& watchdog) {
  for (uint32_t polls = 1;; ++polls) {
    const uint32_t seen = ptx::ld_acquire_sys(flag);
    if (epoch_reached(seen, expected)) return true;
    if (polls % kPollsPerCheck == 0 && watchdog.gives_up(site, expected, seen)) return false;
  }
}

}  // namespace dualpipe
