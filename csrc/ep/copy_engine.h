// What the copy-engine path needs besides the pack and unpack kernels: a bounded wait, on the
// device, for the copies of the other ranks.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "comm/launch_args.h"

namespace dualpipe {

struct ArrivalsCall {
  uint32_t rank;
};

struct ArrivalsArgs {
  LaunchArgs launch;
  uint32_t combine;  // 1: rows come back from the ranks they were sent to
  ArrivalsCall calls[kMaxLocalRanks];
};

// Enqueues a CTA per rank that waits until the copies of every other rank are there.
cudaError_t launch_arrivals(const ArrivalsArgs& args, cudaStream_t stream);

}  // namespace dualpipe
