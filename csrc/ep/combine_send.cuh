// What the warps of a combine know, and those that send rows as they are. See combine.cu for the
// protocol.
#pragma once

#include <cstdint>

#include "ep/combine.h"
#include "ep/ring.cuh"
#include "ep/row_types.cuh"
#include "ep/scan.cuh"
#include "ep/transfer.cuh"
#include "ep/work_queue.cuh"

namespace dualpipe {

// What all warps of a CTA know.
struct Combine : Transfer<CombineArgs, CombineCall> {
  const int32_t* first_rows;  // [R] first row at rank r of what this rank sent there; shared

  // Rows that one flag announces, on all ranks: in a Buffer for few tokens every row, or few warps
  // would do all the work.
  __device__ uint32_t chunk_rows() const { return run_tokens(max_tokens()); }
  // The chunk of row `i` of a segment.
  __device__ uint32_t chunk_of(uint32_t i) const { return chunk_rows() == 1 ? i : i / kRunTokens; }
  // Row `i` of what rank `from` has sent: every rank has a segment of its own.
  __device__ uint64_t segment_row(uint32_t from, uint32_t i) const {
    return uint64_t{from} * layout().shape.max_tokens + i;
  }
  // Rows lie in a slab at whole lines.
  __device__ uint8_t* slab_row(uint8_t* slab, uint64_t row) const {
    return layout().slab.rows.in(slab) + row * round_up(args.row_bytes, kRegionAlignment);
  }
  __device__ const uint8_t* input_row(uint64_t row) const {
    return call.rows + row * args.row_bytes;
  }
};

// --- sending -------------------------------------------------------------------------------------

// Rows that one flag announces: part of what this rank sends to one other.
struct Chunk {
  uint32_t source = 0;  // rank that sent the tokens, and gets the rows
  uint32_t index = 0;
  uint32_t first = 0, last = 0;  // rows of that rank's segment
  uint64_t input = 0;            // row in token layout of the segment's first
};

// The chunks of one part of all segments that a queue hands out: index by index over all ranks, so
// that no two ranks push at one receiver for long.
class ChunkCursor {
 public:
  __device__ __forceinline__ ChunkCursor(const Combine& c, const WorkQueue& queue,
                                         const SegmentPart& part)
      : c_(c), queue_(queue), part_(part) {
    uint32_t most = 0;
    for (uint32_t s = 0; s < c.num_ranks(); ++s) {
      if (s == c.me()) continue;
      const uint32_t rows = c.sent(s, c.me());
      most = max(most, last_row(rows) - first_row(rows));
    }
    end_ = c.chunk_of(most + c.chunk_rows() - 1) * (c.num_ranks() - 1);
  }

  // Goes to the next chunk; false if there is none.
  __device__ __forceinline__ bool advance(Chunk* chunk) {
    for (;;) {
      const uint32_t next = queue_.take(), others = c_.num_ranks() - 1;
      if (next >= end_) return false;
      queue_.ask();
      const uint32_t index = next / others;
      const uint32_t source = (c_.me() + 1 + next % others) % c_.num_ranks();
      const uint32_t rows = c_.sent(source, c_.me());
      const uint32_t first = first_row(rows) + index * c_.chunk_rows(), last = last_row(rows);
      if (first >= last) continue;
      *chunk = {source, index, first, min(first + c_.chunk_rows(), last),
                uint64_t(c_.first_row(source, c_.me()))};
      return true;
    }
  }

 private:
  __device__ uint32_t first_row(uint32_t rows) const {
    return part_.first_row(c_.max_tokens(), rows);
  }
  __device__ uint32_t last_row(uint32_t rows) const {
    return part_.last_row(c_.max_tokens(), rows);
  }

  const Combine& c_;
  WorkQueue queue_;
  const SegmentPart part_;
  uint32_t end_;
};

// What both ways of sending share: permits, places, flags.
template <bool kStaging>
class ChunkSender {
 public:
  __device__ ChunkSender(const Combine& c, uint32_t staging_slab)
      : c_(c), staging_slab_(staging_slab), lane_(threadIdx.x % 32) {}

  // Waits for the leave of every rank that gets rows. False if this rank has failed.
  __device__ bool open() const {
    if (kStaging) return true;
    return c_.wait_for_permits(
        Phase::kCombinePermit, [&](uint32_t to) { return c_.sent(to, c_.me()) != 0; },
        [](uint32_t, uint32_t) {});
  }

  // Where row `i` of the segment of rank `to` goes, and the numbers of its choices.
  __device__ uint8_t* row(uint32_t to, uint32_t i) const {
    return c_.slab_row(slab(to), c_.segment_row(kStaging ? to : c_.me(), i));
  }
  __device__ uint8_t* weights(uint32_t to, uint32_t i) const {
    return c_.slab_weights(slab(to), c_.segment_row(kStaging ? to : c_.me(), i));
  }

  // The chunk's stores are complete, or ordinary ones of this warp.
  __device__ void publish(uint32_t to, uint32_t chunk) const {
    if (kStaging) return;
    __syncwarp();
    if (lane_ == 0) ptx::st_release_sys(c_.run_flags(to, c_.me()) + chunk, c_.epoch);
  }

 private:
  __device__ uint8_t* slab(uint32_t to) const {
    return kStaging ? c_.slab(c_.me(), staging_slab_) : c_.slab(to, 0);
  }

  const Combine& c_;
  const uint32_t staging_slab_;
  const uint32_t lane_;
};

// The numbers behind the payload in a stage of a combine, on 16 bytes: a header, then the row's
// weights.
struct CombineNumbers {
  uint32_t source, row, offset;  // row of the segment of that rank, byte of the row
  uint32_t unused;

  static constexpr uint32_t kWeights = 16;  // offset of the weights
  __device__ static CombineNumbers& in(uint8_t* extra) {
    return *reinterpret_cast<CombineNumbers*>(extra);
  }
};

// Token layout: rows go as they are, by bulk copies through a ring.
template <bool kStaging>
class CopyChunks {
 public:
  __device__ CopyChunks(const Combine& c, uint32_t piece_bytes, const WorkQueue& queue,
                        const StagedPart& staged)
      : c_(c),
        sender_(c, staged.staging_slab),
        piece_bytes_(piece_bytes),
        cursor_(c, queue, kStaging ? staged.part : SegmentPart::whole()) {}

  __device__ __forceinline__ bool load(Ring& ring, uint32_t stage) {
    if (failed_) return false;
    if (row_ == chunk_.last) {
      if (!cursor_.advance(&chunk_)) return false;
      row_ = chunk_.first;
    }
    const uint32_t bytes = min(piece_bytes_, c_.args.row_bytes - offset_);
    // A row that there was no room for at this rank does not exist; anything may be sent instead.
    const uint64_t row = min(chunk_.input + row_, c_.call.num_rows - 1);
    const bool with_weights = c_.call.row_weights != nullptr && offset_ == 0;
    const uint32_t weight_bytes = c_.top_k() * c_.args.weight_bytes;
    const uint8_t* weights = c_.call.row_weights + row * weight_bytes;
    // Bulk copies move whole 16 bytes.
    const bool bulk_weights = with_weights && weight_bytes % 16 == 0;
    if (with_weights && !bulk_weights && threadIdx.x % 32 < c_.top_k()) {
      c_.copy_weight(ring.extra(stage) + CombineNumbers::kWeights, threadIdx.x % 32, weights,
                     threadIdx.x % 32);
    }
    if (threadIdx.x % 32 == 0) {
      CombineNumbers::in(ring.extra(stage)) = {chunk_.source, row_, offset_, 0};
      uint64_t* full = ring.full(stage);
      ptx::mbarrier_arrive_expect_tx(full, bytes + (bulk_weights ? weight_bytes : 0));
      ptx::bulk_load(ring.piece(stage), c_.input_row(row) + offset_, bytes, full);
      if (bulk_weights) {
        ptx::bulk_load(ring.extra(stage) + CombineNumbers::kWeights, weights, weight_bytes, full);
      }
    }
    __syncwarp();
    offset_ += bytes;
    if (offset_ == c_.args.row_bytes) {
      offset_ = 0;
      ++row_;
    }
    return true;
  }

  __device__ __forceinline__ void store(Ring& ring, uint32_t stage) {
    const CombineNumbers at = CombineNumbers::in(ring.extra(stage));
    const Announced chunk{at.source, c_.chunk_of(at.row)};
    if (chunk != current_) begin_chunk(chunk);
    if (failed_) return;
    if (steps_of_chunk_ == kStepsBeforeFlag) announce_previous();
    ++steps_of_chunk_;
    const uint32_t bytes = min(piece_bytes_, c_.args.row_bytes - at.offset);
    const bool with_weights = c_.call.row_weights != nullptr && at.offset == 0;
    if (with_weights && c_.top_k() * c_.args.weight_bytes % 16 != 0) {
      ptx::fence_proxy_async_shared();
      __syncwarp();
    }
    if (threadIdx.x % 32 == 0) {
      ptx::bulk_store(sender_.row(at.source, at.row) + at.offset, ring.piece(stage), bytes);
      if (with_weights) {
        ptx::bulk_store(sender_.weights(at.source, at.row),
                        ring.extra(stage) + CombineNumbers::kWeights,
                        round_up(c_.top_k() * c_.args.weight_bytes, 16));
      }
    }
  }

  // Nothing is in flight and nothing is left: the last chunks are complete.
  __device__ __forceinline__ bool wait() {
    if (failed_) return false;
    ptx::bulk_wait_group<0>();
    publish(previous_);
    publish(current_);
    return false;
  }

 private:
  // What a flag tells of.
  struct Announced {
    uint32_t source = 0, chunk = kNone;
    static constexpr uint32_t kNone = ~0u;
    __device__ bool operator!=(const Announced& other) const {
      return source != other.source || chunk != other.chunk;
    }
  };

  __device__ __forceinline__ void publish(const Announced& chunk) const {
    if (chunk.chunk != Announced::kNone) sender_.publish(chunk.source, chunk.chunk);
  }

  // Tells of the chunk before this one, as a dispatch does of a run.
  __device__ __forceinline__ void announce_previous() {
    if (kStaging || previous_.chunk == Announced::kNone) return;
    bulk_wait_group_at_most(steps_of_chunk_);
    publish(previous_);
    previous_ = {};
  }

  __device__ __forceinline__ void begin_chunk(const Announced& chunk) {
    if (current_.chunk == Announced::kNone && !sender_.open()) {
      failed_ = true;
      return;
    }
    announce_previous();  // if this chunk had fewer steps than that
    previous_ = current_;
    current_ = chunk;
    steps_of_chunk_ = 0;
  }

  const Combine& c_;
  const ChunkSender<kStaging> sender_;
  const uint32_t piece_bytes_;
  ChunkCursor cursor_;
  Chunk chunk_;                    // being loaded
  uint32_t row_ = 0, offset_ = 0;  // of it
  Announced current_, previous_;   // being stored, and the one before
  uint32_t steps_of_chunk_ = 0;    // of the current one
  bool failed_ = false;
};

}  // namespace dualpipe
