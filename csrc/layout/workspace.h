// What one rank's communication memory holds and where. Allocated once per buffer, the same size on
// every rank; peers write into it through the peer table.
//
//   control   this rank's own state, then flags that peers set
//   routes    twice, by turns:
//     ids     [R, T, id_pitch]    expert ids of every rank's tokens, -1 where dropped
//     counts  [R, P, R + E + 6]   what each part of a rank's tokens needs, see RouteCounts
//   slabs     num_slabs times:
//     rows     [R * T, row_pitch]    payload, grouped by the rank that sent it, in its order
//     scales   [R * T, scale_pitch]  quantisation scales of each row; empty for BF16
//     weights  [R * T, weight_pitch] numbers of single choices
//
// R ranks, E experts, T tokens per rank at most, K top-k, P parts of a rank's tokens.
#pragma once

#include <cstdint>

#include "layout/carver.h"
#include "layout/segment.h"

namespace dualpipe {

// A flag has a cache line of its own: each is polled by one waiter and written by one peer.
struct alignas(kRegionAlignment) FlagLine {
  uint32_t value;
};

// A peer's leave to write into a slab of its memory.
struct alignas(kRegionAlignment) PermitLine {
  uint32_t epoch;  // of the transfer that may write
  uint32_t slab;   // where to
  uint32_t call;   // what the peer does in it, see hello()
};

// Written by this rank only.
struct alignas(kRegionAlignment) ControlState {
  uint32_t abort;           // not 0 once a wait of this rank has failed
  uint32_t barrier_epoch;   // barriers entered, modulo 2^32
  uint32_t route_epoch;     // routes finished
  uint32_t transfer_epoch;  // dispatches and combines finished
  uint32_t ticket;          // CTAs of the running kernel that have finished
  uint32_t taken[3];        // pieces of work that warps have taken, of each Queue
  // Of the transfer that the copy engines carry; as many as a transfer has parts at most, so that
  // one copy can tell of several.
  uint32_t copy_epochs[kSegmentUnits];
};

// The roles whose warps share their work; see WorkQueue.
enum class Queue : uint32_t { kSend, kOwn, kReceive };

// Tokens are sent in runs of consecutive tokens; a flag tells that a run has arrived. Short, so
// that all warps end at about the same time: with 16 tokens a run, a dispatch of 4096 took a fifth
// longer.
inline constexpr uint32_t kRunTokens = 4;

// Of small batches every token is a run. Sender and receiver both derive it from the number of
// tokens of the sender.
DUALPIPE_HD constexpr uint32_t run_tokens(uint32_t num_tokens) {
  return num_tokens > 1024 ? kRunTokens : 1;
}

DUALPIPE_HD constexpr uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }
DUALPIPE_HD constexpr uint32_t round_up(uint32_t a, uint32_t b) { return ceil_div(a, b) * b; }

// Most runs that a rank's tokens can make.
DUALPIPE_HD constexpr uint32_t max_runs(uint32_t max_tokens) {
  const uint32_t single = max_tokens < 1024 ? max_tokens : 1024;
  const uint32_t whole = ceil_div(max_tokens, kRunTokens);
  return single > whole ? single : whole;
}

// A rank's tokens are routed in parts, a CTA each; parts are whole runs. Small batches in fewer:
// every part of every rank is another set of counts that all jobs add up.
inline constexpr uint32_t kMostRouteParts = 8;
inline constexpr uint32_t kPartTokens = 512;  // what the threads of a CTA take at once

DUALPIPE_HD constexpr uint32_t route_parts(uint64_t max_tokens) {
  const uint64_t parts = (max_tokens + kPartTokens - 1) / kPartTokens;
  return parts < 1 ? 1 : parts < kMostRouteParts ? static_cast<uint32_t>(parts) : kMostRouteParts;
}

DUALPIPE_HD constexpr uint32_t part_tokens(uint32_t num_tokens, uint32_t parts) {
  return round_up(ceil_div(num_tokens, parts), kRunTokens);
}

// One row of the counts that ranks exchange: what a part of a rank's tokens needs. The settings of
// the call ride along, so that every rank can see that all ranks made the same call.
struct RouteCounts {
  enum : uint32_t {
    kTokens,     // of the rank, not of the part
    kBadIds,     // ids out of range, in this part
    kLayout,     // RowLayout
    kAlignment,  // of the expert layout, or rows of its groups
    kMaxRows,    // that the rank, or each of its groups, has room for; -1 for any number
    kZeroCopy,
    kHeader,  // numbers before the counts: [R] tokens for each rank, then [E] rows for each expert
  };
};

struct ControlLayout {
  Region<ControlState> state;      // [1]
  Region<FlagLine> barrier_flags;  // [R], one per peer
  Region<PermitLine> permits;      // [R], from each peer
  Region<uint32_t> route_flags;    // [R, P]
  // [R, max_runs], runs (dispatch) or chunks (combine) of each peer, or parts (copy engines)
  Region<uint32_t> run_flags;
  uint64_t runs = 0;  // max_runs
  uint64_t bytes = 0;
};

struct SlabLayout {
  Region<uint8_t> rows;
  Region<uint8_t> scales;
  Region<uint8_t> weights;
  uint64_t row_pitch = 0;     // bytes from one row to the next, at most
  uint64_t scale_pitch = 0;   // likewise, of one row's scales
  uint64_t weight_pitch = 0;  // likewise, of one row's numbers
  uint64_t bytes = 0;
};

struct WorkspaceShape {
  uint64_t num_ranks = 0;
  uint64_t num_experts = 0;
  uint64_t top_k = 0;
  uint64_t max_tokens = 0;    // per rank
  uint64_t row_bytes = 0;     // payload of one token
  uint64_t scale_bytes = 0;   // scales of one token, 0 for none
  uint64_t weight_bytes = 4;  // of one choice's number
  uint64_t num_slabs = 0;
};

struct WorkspaceLayout {
  WorkspaceShape shape;
  ControlLayout control;
  Region<int16_t> ids;       // [2, R, T, id_pitch]
  Region<int32_t> counts;    // [2, R, P, count_pitch]
  uint32_t parts = 0;        // of a rank's tokens, in which they are routed
  uint64_t id_pitch = 0;     // ids of one token, whole 16 bytes
  uint64_t count_pitch = 0;  // numbers of one part
  SlabLayout slab;           // offsets from the start of a slab
  Region<uint8_t> slabs;     // all of them; slab i starts at slab_offset(i)
  uint64_t bytes = 0;        // of the whole workspace; 0 if that does not fit 63 bits

  DUALPIPE_HD constexpr uint64_t slab_offset(uint64_t i) const {
    return slabs.offset + i * slab.bytes;
  }
};

DUALPIPE_HD constexpr ControlLayout make_control_layout(uint64_t num_ranks, uint64_t runs,
                                                        uint64_t parts) {
  Carver carver;
  ControlLayout control;
  control.state = carver.take<ControlState>(1);
  control.barrier_flags = carver.take<FlagLine>(num_ranks);
  control.permits = carver.take<PermitLine>(num_ranks);
  control.route_flags = carver.take<uint32_t>(num_ranks, parts);
  control.run_flags = carver.take<uint32_t>(num_ranks, runs);
  control.runs = runs;
  control.bytes = carver.overflowed() ? 0 : carver.bytes();
  return control;
}

DUALPIPE_HD constexpr SlabLayout make_slab_layout(const WorkspaceShape& shape) {
  SlabLayout slab;
  if (shape.row_bytes > kMaxBytes || shape.scale_bytes > kMaxBytes) return slab;
  Carver carver;
  // A pitch of whole lines keeps every bulk copy of a row at full speed.
  slab.row_pitch = Carver::align_up(shape.row_bytes);
  // 16 bytes is the unit of bulk copies.
  slab.scale_pitch = (shape.scale_bytes + 15) / 16 * 16;
  slab.weight_pitch = (shape.top_k * shape.weight_bytes + 15) / 16 * 16;
  slab.rows = carver.take<uint8_t>(shape.num_ranks, shape.max_tokens, slab.row_pitch);
  slab.scales = carver.take<uint8_t>(shape.num_ranks, shape.max_tokens, slab.scale_pitch);
  slab.weights = carver.take<uint8_t>(shape.num_ranks, shape.max_tokens, slab.weight_pitch);
  slab.bytes = carver.overflowed() ? 0 : carver.bytes();
  return slab;
}

// Every count of the shape is at least 1, except scale_bytes; max_tokens fits 31 bits, top_k is at
// most 32.
DUALPIPE_HD constexpr WorkspaceLayout make_workspace_layout(const WorkspaceShape& shape) {
  WorkspaceLayout layout;
  layout.shape = shape;
  layout.parts = route_parts(shape.max_tokens);
  layout.control = make_control_layout(
      shape.num_ranks, max_runs(static_cast<uint32_t>(shape.max_tokens)), layout.parts);
  layout.slab = make_slab_layout(shape);
  if (layout.control.bytes == 0 || layout.slab.bytes == 0) return layout;
  layout.id_pitch = round_up(static_cast<uint32_t>(shape.top_k), 8);
  layout.count_pitch = RouteCounts::kHeader + shape.num_ranks + shape.num_experts;
  Carver carver;
  carver.take<uint8_t>(layout.control.bytes);
  layout.ids = carver.take<int16_t>(2 * shape.num_ranks, shape.max_tokens, layout.id_pitch);
  layout.counts = carver.take<int32_t>(2 * shape.num_ranks, layout.parts, layout.count_pitch);
  layout.slabs = carver.take<uint8_t>(shape.num_slabs, layout.slab.bytes);
  layout.bytes = carver.overflowed() ? 0 : carver.bytes();
  return layout;
}

static_assert(sizeof(FlagLine) == kRegionAlignment);
static_assert(sizeof(PermitLine) == kRegionAlignment);
static_assert(sizeof(ControlState) == kRegionAlignment);

}  // namespace dualpipe
