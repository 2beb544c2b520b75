// The barrier as a kernel of its own: used when ranks join or reset, and to test the rules that
// every kernel follows (peer table, epochs, bounded waits, error record).
#include "comm/barrier.h"

#include "comm/barrier.cuh"

namespace dualpipe {

__global__ void __launch_bounds__(kMaxRanks)
    barrier_kernel(const __grid_constant__ BarrierArgs args) {
  const uint32_t rank = args.first_rank + blockIdx.x;
  const Watchdog watchdog{args.control.state.in(args.peers.base[rank]), args.records + blockIdx.x,
                          ptx::globaltimer_ns(), args.timeout_ns};
  barrier_all_ranks(args.peers, args.control, rank, watchdog);
}

cudaError_t launch_barrier(const BarrierArgs& args, cudaStream_t stream) {
  barrier_kernel<<<args.num_local, kMaxRanks, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace dualpipe
