// The copy-engine path: kernels only at both ends, the link is driven by the copy engines.
//
//   stream of the call     pack ----------------+          wait --- unpack or reduce
//   stream of each peer                         +-> rows -> flag -> ...
//
//   pack    gives the peers leave to write (permits), brings rows into the staging slab, segment by
//           segment of their destinations, and ends when the peers' permits are there
//   rows    cudaMemcpyAsync from a segment of the staging slab, or straight from rows in token
//           layout, to the segment of this rank in the peer's slab
//   flag    cudaMemcpyAsync of the word `copy_epoch`, which pack has written, to the peer's flag.
//           Copies of one stream come one after the other, so the flag is there only after the
//           rows. It takes no SM, and since the epoch lives on the device, a CUDA graph can replay
//           it.
//   wait    one thread per peer, with the time-out of every wait
//   unpack  dispatch.cu's receive role; reduce: combine.cu's reduce role
#include "ep/copy_engine.h"

#include "comm/launch.cuh"

namespace dualpipe {

__global__ void __launch_bounds__(kMaxRanks)
    arrivals_kernel(const __grid_constant__ ArrivalsArgs args) {
  const ArrivalsCall& call = args.calls[blockIdx.x];
  const Watchdog watchdog = make_watchdog(args.launch, blockIdx.x, call.rank);
  const uint32_t source = threadIdx.x, num_ranks = args.launch.peers.num_ranks;
  if (source >= num_ranks || source == call.rank) return;
  // Of all, also of those that have no rows for this rank: each sends a flag in every call, and
  // what it copies before the flag must not land in a later call.
  const ControlLayout& control = args.launch.layout.control;
  const uint32_t epoch = watchdog.state->transfer_epoch + 1;
  const uint32_t* flags = control.run_flags.in(args.launch.peers.base[call.rank]);
  const Phase phase = args.combine != 0 ? Phase::kCombineRows : Phase::kDispatchRows;
  wait_epoch(flags + source * control.runs, epoch, {phase, call.rank, source, 0, epoch}, watchdog);
}

cudaError_t launch_arrivals(const ArrivalsArgs& args, cudaStream_t stream) {
  arrivals_kernel<<<args.launch.num_local, kMaxRanks, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace dualpipe
