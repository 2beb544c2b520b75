// What the copy-engine path needs besides the kernels that pack and take in: a bounded wait, on the
// device, for the copies of the other ranks.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "comm/error_record.h"
#include "comm/launch_args.h"

namespace dualpipe {

struct ArrivalsCall {
  uint32_t rank;
};

struct ArrivalsArgs {
  LaunchArgs launch;
  Phase phase;
  uint32_t part;
  ArrivalsCall calls[kMaxLocalRanks];
};

// Enqueues a CTA per rank that waits until that part of every other rank is there, also of those
// that have no rows for this one.
cudaError_t launch_arrivals(const ArrivalsArgs& args, cudaStream_t stream);

}  // namespace dualpipe
