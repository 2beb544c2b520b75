// What the warps of a combine know, and those that send rows as they are. See combine.cu for the
// protocol.
#pragma once

#include <cstdint>

#include "ep/combine.h"
#include "ep/ring.cuh"
#include "ep/row_types.cuh"
#include "ep/scan.cuh"
#include "ep/transfer.cuh"

namespace dualpipe {

// Rows that one flag announces.
inline constexpr uint32_t kChunkRows = kRunTokens;

// What all warps of a CTA know.
struct Combine : Transfer<CombineArgs, CombineCall> {
  const int32_t* first_rows;  // [R] first row at rank r of what this rank sent there; shared

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

// Which rows a send warp takes: chunks of kChunkRows rows, chunk by chunk over all ranks, so that
// no two ranks push at one receiver for long.
class ChunkCursor {
 public:
  __device__ ChunkCursor(const Combine& c, uint32_t first, uint32_t step)
      : c_(c), next_(first), step_(step) {
    int32_t most = 0;
    for (uint32_t s = 0; s < c.num_ranks(); ++s) {
      if (s != c.me()) most = max(most, c.sent(s, c.me()));
    }
    end_ = ceil_div(most, kChunkRows) * (c.num_ranks() - 1);
  }

  // Goes to the next chunk; false if there is none.
  __device__ __forceinline__ bool advance() {
    while (next_ < end_) {
      const uint32_t others = c_.num_ranks() - 1;
      chunk = next_ / others;
      source = (c_.me() + 1 + next_ % others) % c_.num_ranks();
      next_ += step_;
      const uint32_t rows = c_.sent(source, c_.me());
      if (chunk * kChunkRows >= rows) continue;
      first = chunk * kChunkRows;
      last = min(first + kChunkRows, rows);
      input = c_.first_row(source, c_.me());
      return true;
    }
    return false;
  }

  uint32_t source = 0;  // rank that sent the tokens, and gets the rows
  uint32_t chunk = 0;
  uint32_t first = 0, last = 0;  // rows of that rank's segment
  uint64_t input = 0;            // row in token layout of the segment's first

 private:
  const Combine& c_;
  uint32_t next_, end_, step_;
};

// What both ways of sending share: permits, places, flags.
template <bool kStaging>
class ChunkSender {
 public:
  __device__ ChunkSender(const Combine& c, uint32_t staging_slab)
      : c_(c), staging_slab_(staging_slab), lane_(threadIdx.x % 32) {}

  // Waits for the leave of every rank that gets rows, or of everyone: the copy engines write to all
  // peers, whatever these have sent. False if this rank has failed.
  __device__ bool open(bool everyone = false) const {
    if (kStaging) return true;
    return c_.wait_for_permits(
        Phase::kCombinePermit, [&](uint32_t to) { return everyone || c_.sent(to, c_.me()) != 0; },
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

// Token layout: rows go as they are, by bulk copies through a ring.
template <bool kStaging>
class CopyChunks {
 public:
  __device__ CopyChunks(const Combine& c, uint32_t piece_bytes, uint32_t first, uint32_t step,
                        uint32_t staging_slab)
      : c_(c),
        sender_(c, staging_slab),
        piece_bytes_(piece_bytes),
        loading_(c, first, step),
        storing_(c, first, step) {}

  __device__ __forceinline__ bool load(Ring& ring, uint32_t stage) {
    if (failed_) return false;
    if (load_row_ == loading_.last) {
      if (!loading_.advance()) {
        load_row_ = loading_.last;
        return false;
      }
      load_row_ = loading_.first;
    }
    const uint32_t bytes = min(piece_bytes_, c_.args.row_bytes - load_offset_);
    // A row that there was no room for at this rank does not exist; anything may be sent instead.
    const uint64_t row = min(loading_.input + load_row_, c_.call.num_rows - 1);
    const bool with_weights = c_.call.row_weights != nullptr && load_offset_ == 0;
    const uint32_t weight_bytes = c_.top_k() * c_.args.weight_bytes;
    const uint8_t* weights = c_.call.row_weights + row * weight_bytes;
    // Bulk copies move whole 16 bytes.
    const bool bulk_weights = with_weights && weight_bytes % 16 == 0;
    if (with_weights && !bulk_weights && threadIdx.x % 32 < c_.top_k()) {
      c_.copy_weight(ring.extra(stage), threadIdx.x % 32, weights, threadIdx.x % 32);
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      uint64_t* full = ring.full(stage);
      ptx::mbarrier_arrive_expect_tx(full, bytes + (bulk_weights ? weight_bytes : 0));
      ptx::bulk_load(ring.piece(stage), c_.input_row(row) + load_offset_, bytes, full);
      if (bulk_weights) ptx::bulk_load(ring.extra(stage), weights, weight_bytes, full);
    }
    load_offset_ += bytes;
    if (load_offset_ == c_.args.row_bytes) {
      load_offset_ = 0;
      ++load_row_;
    }
    return true;
  }

  __device__ __forceinline__ void store(Ring& ring, uint32_t stage) {
    if (store_row_ == storing_.last) begin_chunk();
    if (failed_) return;
    ++steps_of_chunk_;
    const uint32_t bytes = min(piece_bytes_, c_.args.row_bytes - store_offset_);
    const bool with_weights = c_.call.row_weights != nullptr && store_offset_ == 0;
    if (with_weights && c_.top_k() * c_.args.weight_bytes % 16 != 0) {
      ptx::fence_proxy_async_shared();
      __syncwarp();
    }
    if (threadIdx.x % 32 == 0) {
      ptx::bulk_store(sender_.row(storing_.source, store_row_) + store_offset_, ring.piece(stage),
                      bytes);
      if (with_weights) {
        ptx::bulk_store(sender_.weights(storing_.source, store_row_), ring.extra(stage),
                        round_up(c_.top_k() * c_.args.weight_bytes, 16));
      }
    }
    store_offset_ += bytes;
    if (store_offset_ == c_.args.row_bytes) {
      store_offset_ = 0;
      ++store_row_;
    }
  }

  // Nothing is in flight and nothing is left: the last chunks are complete.
  __device__ __forceinline__ bool wait() {
    if (failed_) return false;
    ptx::bulk_wait_group<0>();
    if (have_previous_) sender_.publish(previous_source_, previous_chunk_);
    if (have_current_) sender_.publish(storing_.source, storing_.chunk);
    return false;
  }

 private:
  // The flag of a chunk is sent one chunk later, when waiting for its stores costs nothing.
  __device__ __forceinline__ void begin_chunk() {
    if (!have_current_ && !sender_.open()) {
      failed_ = true;
      return;
    }
    if (have_previous_) {
      bulk_wait_group_at_most(steps_of_chunk_);
      sender_.publish(previous_source_, previous_chunk_);
    }
    have_previous_ = have_current_;
    previous_source_ = storing_.source;
    previous_chunk_ = storing_.chunk;
    have_current_ = storing_.advance();
    store_row_ = storing_.first;
    steps_of_chunk_ = 0;
  }

  const Combine& c_;
  const ChunkSender<kStaging> sender_;
  const uint32_t piece_bytes_;
  ChunkCursor loading_, storing_;
  uint32_t load_row_ = 0, load_offset_ = 0, store_row_ = 0, store_offset_ = 0;
  uint32_t previous_source_ = 0, previous_chunk_ = 0, steps_of_chunk_ = 0;
  bool have_current_ = false, have_previous_ = false, failed_ = false;
};

}  // namespace dualpipe
