// What one rank's communication memory holds and where. Allocated once per buffer, the same size on
// every rank; peers write into it through the peer table.
//
//   control   this rank's own state, then one flag line per peer
//   counts    [R, E]     rows that source r sends for expert e, written by source r
//   slabs     num_slabs times:
//     rows           [R * T, row_pitch]    payload, grouped by source rank, in source-token order
//     scales         [R * T, scale_pitch]  quantisation scales of each row; empty for BF16
//     source_tokens  [R * T]               token index on its source rank
//     expert_ids     [R * T, K]            local expert ids, -1 where the choice lives elsewhere
//     weights        [R * T, K]            their top-k weights
//
// R ranks, E experts, T tokens per rank at most, K top-k.
#pragma once

#include <cstdint>

#include "layout/carver.h"

namespace dualpipe {

// A flag has a cache line of its own: each is polled by one waiter and written by one peer.
struct alignas(kRegionAlignment) FlagLine {
  uint32_t value;
};

// Written by this rank only.
struct alignas(kRegionAlignment) ControlState {
  uint32_t abort;          // not 0 once a wait of this rank has failed
  uint32_t barrier_epoch;  // barriers entered, modulo 2^32
};

struct ControlLayout {
  Region<ControlState> state;      // [1]
  Region<FlagLine> barrier_flags;  // [R], one per peer
  uint64_t bytes = 0;
};

struct SlabLayout {
  Region<uint8_t> rows;
  Region<uint8_t> scales;
  Region<int32_t> source_tokens;
  Region<int32_t> expert_ids;
  Region<float> weights;
  uint64_t row_pitch = 0;    // bytes from one row to the next
  uint64_t scale_pitch = 0;  // likewise, of one row's scales
  uint64_t bytes = 0;
};

struct WorkspaceShape {
  uint64_t num_ranks = 0;
  uint64_t num_experts = 0;
  uint64_t top_k = 0;
  uint64_t max_tokens = 0;   // per rank
  uint64_t row_bytes = 0;    // payload of one token
  uint64_t scale_bytes = 0;  // scales of one token, 0 for none
  uint64_t num_slabs = 0;
};

struct WorkspaceLayout {
  ControlLayout control;
  Region<int32_t> counts;
  SlabLayout slab;        // offsets from the start of a slab
  Region<uint8_t> slabs;  // all of them; slab i starts at slab_offset(i)
  uint64_t bytes = 0;     // of the whole workspace; 0 if that does not fit 63 bits

  DUALPIPE_HD constexpr uint64_t slab_offset(uint64_t i) const {
    return slabs.offset + i * slab.bytes;
  }
};

DUALPIPE_HD constexpr ControlLayout make_control_layout(uint64_t num_ranks) {
  Carver carver;
  ControlLayout control;
  control.state = carver.take<ControlState>(1);
  control.barrier_flags = carver.take<FlagLine>(num_ranks);
  control.bytes = carver.overflowed() ? 0 : carver.bytes();
  return control;
}

DUALPIPE_HD constexpr SlabLayout make_slab_layout(const WorkspaceShape& shape) {
  SlabLayout slab;
  if (shape.row_bytes > kMaxBytes || shape.scale_bytes > kMaxBytes) return slab;
  Carver carver;
  // A pitch of whole lines keeps every bulk copy of a row at full speed.
  slab.row_pitch = Carver::align_up(shape.row_bytes);
  // 16 bytes is what one bulk copy or one vector load of a row's scales needs.
  slab.scale_pitch = (shape.scale_bytes + 15) / 16 * 16;
  slab.rows = carver.take<uint8_t>(shape.num_ranks, shape.max_tokens, slab.row_pitch);
  slab.scales = carver.take<uint8_t>(shape.num_ranks, shape.max_tokens, slab.scale_pitch);
  slab.source_tokens = carver.take<int32_t>(shape.num_ranks, shape.max_tokens);
  slab.expert_ids = carver.take<int32_t>(shape.num_ranks, shape.max_tokens, shape.top_k);
  slab.weights = carver.take<float>(shape.num_ranks, shape.max_tokens, shape.top_k);
  slab.bytes = carver.overflowed() ? 0 : carver.bytes();
  return slab;
}

// Every count of the shape is at least 1, except scale_bytes.
DUALPIPE_HD constexpr WorkspaceLayout make_workspace_layout(const WorkspaceShape& shape) {
  WorkspaceLayout layout;
  layout.control = make_control_layout(shape.num_ranks);
  layout.slab = make_slab_layout(shape);
  if (layout.control.bytes == 0 || layout.slab.bytes == 0) return layout;
  Carver carver;
  carver.take<uint8_t>(layout.control.bytes);
  layout.counts = carver.take<int32_t>(shape.num_ranks, shape.num_experts);
  layout.slabs = carver.take<uint8_t>(shape.num_slabs, layout.slab.bytes);
  layout.bytes = carver.overflowed() ? 0 : carver.bytes();
  return layout;
}

static_assert(sizeof(FlagLine) == kRegionAlignment);
static_assert(sizeof(ControlState) == kRegionAlignment);
// The control block comes first, at the same place whatever the rest of the shape.
static_assert(make_control_layout(8).bytes == 9 * kRegionAlignment);

}  // namespace dualpipe
