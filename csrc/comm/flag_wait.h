// One end's turn in a stage-to-stage send: wait for the other end, then get the answer ready.
//
// A sender waits until the receiver has read what lies where the next piece goes; a receiver waits
// until a piece is there. The bytes and the flags are then moved by copy engines, behind this
// kernel on the same stream: see pipeline/copy_channel.py.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "comm/error_record.h"
#include "layout/workspace.h"

namespace dualpipe {

struct FlagWaitArgs {
  ControlState* state;   // of this rank; its abort word ends all its waits
  ErrorRecord* record;   // of this rank, host-mapped
  const uint32_t* flag;  // in this GPU's memory, set by the peer's copy engine
  uint32_t* word;        // in this GPU's memory, what the copy engine will take to the peer's flag
  uint32_t expected;     // what the flag must have come to
  uint32_t number;       // goes into `word` once it has, and if no wait of this rank has failed
  Phase phase;
  uint32_t rank;
  uint32_t peer;
  uint64_t timeout_ns;
};

// Enqueues one thread on `stream` of the current device; does not wait.
cudaError_t launch_flag_wait(const FlagWaitArgs& args, cudaStream_t stream);

}  // namespace dualpipe
