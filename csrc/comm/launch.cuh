// What every communication kernel does at its beginning and at its end: finding out for which rank
// it acts, and counting the epoch on.
#pragma once

#include <cstdint>

#include "comm/launch_args.h"
#include "comm/wait.cuh"
#include "layout/workspace.h"
#include "ptx/grid.cuh"

namespace dualpipe {

// The CTA's place.
struct Place {
  uint32_t local;  // index of its rank among those of the launch
  uint32_t cta;    // among its rank's CTAs

  __device__ static Place here(const LaunchArgs& args) {
    return {blockIdx.x / args.ctas, blockIdx.x % args.ctas};
  }
};

// `matrix`: of a transfer whose senders wait for permits.
__device__ inline Watchdog make_watchdog(const LaunchArgs& args, uint32_t local, uint32_t rank,
                                         const int32_t* matrix = nullptr) {
  const ControlLayout& control = args.layout.control;
  uint8_t* base = args.peers.base[rank];
  return {control.state.in(base), args.records + local,     ptx::globaltimer_ns(),
          args.timeout_ns,        control.permits.in(base), matrix,
          args.peers.num_ranks};
}

// Called by all threads of every CTA as the last thing: the last CTA of the rank counts `*epoch`
// on (null: the transfer has further kernels) and makes the queues full again. All CTAs have read
// the epoch and taken their work before they come here, and the next kernel of the stream reads
// only when the last one has ended, so nobody reads what changes. `epoch` and the ticket are the
// rank's own.
//
// From here on the next kernel may come onto the SMs, if it was launched for that
// (chained_launch.cuh). Not earlier: while this one waits for a peer, the next would hold SMs too,
// and could keep out a kernel of another stream that the peer waits for.
__device__ inline void finish_epoch(ControlState* state, uint32_t* epoch, uint32_t ctas) {
  __syncthreads();
  ptx::griddepcontrol_launch_dependents();
  if (threadIdx.x != 0) return;
  if (atomicAdd(&state->ticket, 1u) + 1 != ctas) return;
  state->ticket = 0;
  for (uint32_t& taken : state->taken) taken = 0;
  if (epoch != nullptr) *epoch += 1;
}

// Test hook: holds a role back, so that races have time to show.
__device__ inline void delay(uint32_t nanoseconds) {
  if (nanoseconds == 0) return;
  const uint64_t start = ptx::globaltimer_ns();
  while (ptx::globaltimer_ns() - start < nanoseconds) __nanosleep(100);
}

}  // namespace dualpipe
