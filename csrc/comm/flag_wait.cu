// The bounded wait of stage-to-stage sends. One thread: it takes a warp's worth of one SM, for as
// long as the other end is late.
#include "comm/flag_wait.h"

#include "comm/wait.cuh"

namespace dualpipe {

// Ordering: the peer's copy engine wrote the flag after everything that came before it on its
// stream, so after the acquire the bytes of a piece, or the end of their reading, are this GPU's
// past; and what follows on the stream starts after this kernel.
//
// After a failure the word stays as it was: the copies that follow then carry an old number, so a
// rank that has failed announces nothing more, and its peers run into their own time-outs instead
// of taking what it has made of missing data.
__global__ void __launch_bounds__(1) flag_wait_kernel(const __grid_constant__ FlagWaitArgs args) {
  const Watchdog watchdog{args.state, args.record, ptx::globaltimer_ns(), args.timeout_ns};
  const WaitSite site{args.phase, args.rank, args.peer, 0, args.number};
  if (wait_epoch(args.flag, args.expected, site, watchdog) && !watchdog.aborted()) {
    *args.word = args.number;
  }
}

cudaError_t launch_flag_wait(const FlagWaitArgs& args, cudaStream_t stream) {
  flag_wait_kernel<<<1, 1, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace dualpipe
