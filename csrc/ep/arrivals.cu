// The wait of the copy-engine path; see copy_engine.cpp for the protocol.
#include "ep/arrivals.h"

#include "comm/launch.cuh"

namespace dualpipe {

__global__ void __launch_bounds__(kMaxRanks)
    arrivals_kernel(const __grid_constant__ ArrivalsArgs args) {
  const ArrivalsCall& call = args.calls[blockIdx.x];
  const Watchdog watchdog = make_watchdog(args.launch, blockIdx.x, call.rank);
  const uint32_t source = threadIdx.x, num_ranks = args.launch.peers.num_ranks;
  if (source >= num_ranks || source == call.rank) return;
  const ControlLayout& control = args.launch.layout.control;
  const uint32_t epoch = watchdog.state->transfer_epoch + 1;
  const uint32_t* flags = control.run_flags.in(args.launch.peers.base[call.rank]);
  wait_epoch(flags + source * control.runs + args.part, epoch,
             {args.phase, call.rank, source, args.part, epoch}, watchdog);
}

cudaError_t launch_arrivals(const ArrivalsArgs& args, cudaStream_t stream) {
  arrivals_kernel<<<args.launch.num_local, kMaxRanks, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace dualpipe
