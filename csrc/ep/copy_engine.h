// The copy-engine path: dispatches and combines whose rows cross the link without an SM. See
// copy_engine.cpp for the protocol.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "ep/combine.h"
#include "ep/dispatch.h"
#include "layout/segment.h"

namespace dualpipe {

// Streams and events, made once: a call may be captured into a graph, when nothing can be made.
class CopyLanes {
 public:
  CopyLanes() = default;
  CopyLanes(const CopyLanes&) = delete;
  CopyLanes& operator=(const CopyLanes&) = delete;
  ~CopyLanes();

  // On the current device, for that many ranks.
  cudaError_t open(uint32_t num_ranks);

  uint32_t num_lanes() const { return static_cast<uint32_t>(lanes_.size()); }
  // What goes to that peer, of all ranks of a launch; but for the rows if these go in turn.
  cudaStream_t lane(uint32_t peer) const { return lanes_[peer]; }
  // Rows that go to one peer after the other.
  cudaStream_t turns() const { return turns_; }
  // Rows of one turn are there. Who waits for an event waits for what it was last recorded after,
  // so one event serves all turns.
  cudaEvent_t turn_over() const { return turn_over_; }
  cudaEvent_t packed(uint32_t part) const { return packed_[part]; }
  cudaEvent_t carried(uint32_t peer) const { return carried_[peer]; }

  // How often rows are copied: with 2.5 all of them twice and the first half once more. A link that
  // takes as many times as long, for measurements.
  double repeats = 1.0;
  // Host memory where copies after the first go, as slowly as a network adapter would read them: so
  // they take little of the memory rate that kernels have. Null: over the link again.
  uint8_t* detour = nullptr;
  uint64_t detour_bytes = 0;

 private:
  std::vector<cudaStream_t> lanes_;
  cudaStream_t turns_ = nullptr;
  cudaEvent_t turn_over_ = nullptr;
  std::vector<cudaEvent_t> packed_, carried_;
};

// What the host knows of one rank's call.
struct CopyCall {
  std::vector<uint32_t> sends;     // [R] rows to each rank, or max_tokens where nobody knows
  std::vector<uint32_t> receives;  // [R] likewise, from each rank
};

// What all ranks of a call share.
struct CopyShape {
  SegmentParts parts;
  bool in_turn;   // rows go to one peer after the other, not to all at once
  bool together;  // of StagedPart
  uint32_t staging_slab;
  Tuning pack;         // of the kernels before the copies
  uint32_t pack_ctas;  //
  Tuning take;         // of those after them
  uint32_t take_ctas;
};

// Enqueue all kernels and copies of a dispatch or a combine; `calls` belong to args.calls. The
// CTAs and the tuning in `args` are replaced. `direct`: rows in token layout, and numbers as dense
// as in a slab, are copied from where they are, and nothing is packed.
cudaError_t carry_dispatch(const CopyLanes& lanes, DispatchArgs args,
                           const std::vector<CopyCall>& calls, const CopyShape& shape,
                           cudaStream_t stream);
cudaError_t carry_combine(const CopyLanes& lanes, CombineArgs args,
                          const std::vector<CopyCall>& calls, const CopyShape& shape, bool direct,
                          cudaStream_t stream);

}  // namespace dualpipe
