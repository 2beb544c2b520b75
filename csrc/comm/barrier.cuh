// A barrier of all ranks, for one CTA of each.
#pragma once

#include <cstdint>

#include "comm/peer_table.h"
#include "comm/wait.cuh"
#include "layout/workspace.h"
#include "ptx/memory.cuh"

namespace dualpipe {

// Thread t < num_ranks signals peer t and waits for peer t; the CTA has at least num_ranks threads,
// all of which call this.
//
// Guarantee: on true, everything that any rank's GPU had written before it entered is visible to
// every thread of the CTA and to later kernels of its stream. On false (all threads alike) this
// rank has failed, see wait_epoch.
//
// Ordering: earlier kernels of the stream, and through __syncthreads the other threads of the CTA,
// happen before the release store of the epoch; the peer's acquire load of it happens before its
// own __syncthreads. A rank may enter barrier n + 1 while a peer still waits in n: that peer reads
// n + 1, which has come to n, and a rank cannot get to n + 2 without it.
__device__ inline bool barrier_all_ranks(const PeerTable& peers, const ControlLayout& control,
                                         uint32_t rank, const Watchdog& watchdog) {
  ControlState* state = watchdog.state;
  const uint32_t epoch = state->barrier_epoch + 1;
  if (__syncthreads_or(watchdog.aborted())) return false;
  // Between the two CTA barriers nobody reads it: all have before, the next call will after.
  if (threadIdx.x == 0) state->barrier_epoch = epoch;

  bool arrived = true;
  const uint32_t peer = threadIdx.x;
  if (peer < peers.num_ranks) {
    FlagLine* theirs = control.barrier_flags.in(peers.base[peer]);
    ptx::st_release_sys(&theirs[rank].value, epoch);
    const FlagLine* mine = control.barrier_flags.in(peers.base[rank]);
    arrived =
        wait_epoch(&mine[peer].value, epoch, {Phase::kBarrier, rank, peer, 0, epoch}, watchdog);
  }
  return __syncthreads_and(arrived);
}

}  // namespace dualpipe
