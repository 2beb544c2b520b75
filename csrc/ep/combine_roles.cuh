// The roles of a combine: warps that send rows back to the ranks of their tokens, and warps that
// sum a token's rows there. See combine.cu for the protocol.
#pragma once

#include <cstdint>

#include "comm/launch.cuh"
#include "ep/combine.h"
#include "ep/ring.cuh"
#include "ep/row_types.cuh"
#include "ep/scan.cuh"
#include "ptx/memory.cuh"

namespace dualpipe {

// Rows that one flag announces.
inline constexpr uint32_t kChunkRows = kRunTokens;

// What all warps of a CTA know.
struct Combine {
  const CombineArgs& args;
  const CombineCall& call;
  Watchdog watchdog;
  uint32_t epoch;
  const int32_t* first_rows;  // [R] first row at rank r of what this rank sent there; shared

  __device__ const LaunchArgs& launch() const { return args.launch; }
  __device__ const WorkspaceLayout& layout() const { return args.launch.layout; }
  __device__ uint32_t me() const { return call.rank; }
  __device__ uint32_t num_ranks() const { return args.launch.peers.num_ranks; }
  __device__ uint32_t top_k() const { return static_cast<uint32_t>(layout().shape.top_k); }
  __device__ uint32_t places() const { return round_up(top_k(), 4); }
  __device__ uint32_t per_rank() const {
    return static_cast<uint32_t>(layout().shape.num_experts) / num_ranks();
  }
  __device__ int32_t sent(uint32_t source, uint32_t to) const {
    return call.matrix[source * num_ranks() + to];
  }
  __device__ int32_t first_row(uint32_t source, uint32_t to) const {
    int32_t row = 0;
    for (uint32_t s = 0; s < source; ++s) row += sent(s, to);
    return row;
  }
  __device__ uint8_t* slab(uint32_t rank, uint32_t index) const {
    return launch().peers.base[rank] + layout().slab_offset(index);
  }
  // Row `i` of what rank `from` has sent: every rank has a segment of its own.
  __device__ uint64_t segment_row(uint32_t from, uint32_t i) const {
    return uint64_t{from} * layout().shape.max_tokens + i;
  }
  __device__ uint8_t* slab_row(uint8_t* slab, uint64_t row) const {
    return layout().slab.rows.in(slab) + row * round_up(args.row_bytes, kRegionAlignment);
  }
  __device__ uint8_t* slab_weights(uint8_t* slab, uint64_t row) const {
    return layout().slab.weights.in(slab) + row * layout().slab.weight_pitch;
  }
  __device__ uint32_t* chunk_flags(uint32_t at, uint32_t source) const {
    return layout().control.run_flags.in(launch().peers.base[at]) + source * layout().control.runs;
  }
  __device__ const uint8_t* input_row(uint64_t row) const {
    return call.rows + row * args.row_bytes;
  }
  __device__ void copy_weight(uint8_t* to, uint64_t i, const uint8_t* from, uint64_t j) const {
    if (args.weight_bytes == 4) {
      reinterpret_cast<uint32_t*>(to)[i] = from ? reinterpret_cast<const uint32_t*>(from)[j] : 0;
    } else {
      reinterpret_cast<uint64_t*>(to)[i] = from ? reinterpret_cast<const uint64_t*>(from)[j] : 0;
    }
  }
};

// --- sending -------------------------------------------------------------------------------------

// Which rows a send warp takes: chunks of 16 rows, chunk by chunk over all ranks, so that no two
// ranks push at one receiver for long.
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

  // Waits for the leave of every rank that gets rows. False if this rank has failed.
  __device__ bool open() const {
    bool open = true;
    for (uint32_t to = lane_; !kStaging && to < c_.num_ranks(); to += 32) {
      if (to == c_.me() || c_.sent(to, c_.me()) == 0) continue;
      const PermitLine* permit =
          c_.layout().control.permits.in(c_.launch().peers.base[c_.me()]) + to;
      const WaitSite site{Phase::kCombinePermit, c_.me(), to, 0, c_.epoch};
      open = open && wait_epoch(&permit->epoch, c_.epoch, site, c_.watchdog);
    }
    return __all_sync(~0u, open) != 0;
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
    if (lane_ == 0) ptx::st_release_sys(c_.chunk_flags(to, c_.me()) + chunk, c_.epoch);
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

// --- summing -------------------------------------------------------------------------------------

// Units of 16 bytes of a row that a lane sums at once, and the piece of a row that a warp does.
inline constexpr uint32_t kSumUnits = 4;
inline constexpr uint32_t kSumPiece = 32 * 16 * kSumUnits;

// What a step of a sum does besides adding its piece; several at once.
enum SumFlags : uint32_t {
  kFirst = 1,      // a new total
  kPart = 2,       // the piece belongs to the part of this rank
  kFirstPart = 4,  // a new part
  kEndPart = 8,    // the part is complete: rounded, it joins the total
  kLast = 16,      // the total is complete
  kRowEnds = 32,   // with this piece the row is complete
  kChunkEnds = 64  // and with this row the chunk
};

// What the loading side of a sum tells its storing side, at the end of a stage.
struct SumHeader {
  uint8_t* out;  // row that gets the total
  double factor;
  uint32_t flags;
  uint32_t offset;  // of the piece
  uint32_t item;    // token, or row of its segment
  uint32_t source;  // rank of the segment
};

// A row to be summed.
template <class Row>
struct SumSource {
  const uint8_t* row;
  typename Row::Sum factor;
  uint32_t flags;
};

// The expert rows of one row in token layout: lane k holds choice k. Appends those that are here,
// in top-k order, to `sources`; returns the new count.
template <class Row>
__device__ uint32_t append_expert_rows(const Combine& c, uint64_t row, SumSource<Row>* sources,
                                       uint32_t count, uint32_t first_flags, uint32_t flags,
                                       uint32_t last_flags) {
  const uint32_t lane = threadIdx.x % 32;
  const int32_t place = lane < c.top_k() ? __ldg(c.call.positions + row * c.places() + lane) : -1;
  const uint32_t here = __ballot_sync(~0u, place >= 0);
  if (place >= 0) {
    const auto* weights = static_cast<const typename Row::Sum*>(c.call.weights);
    const uint32_t before = __popc(here & lanes_below(lane));
    const bool last = before + 1 == __popc(here);
    sources[count + before] = {c.input_row(place), weights != nullptr ? __ldg(weights + place) : 1,
                               flags | (before == 0 ? first_flags : 0) | (last ? last_flags : 0)};
  }
  return count + __popc(here);
}

// Sums rows piece by piece through a ring: one bulk load per source and piece, added in the order
// of the list. A `Lister` offers, each called by the whole warp:
//   Next next(sources, &count, &header)  the sources of the next row; kNotYet if they have not come
//   bool wait()                          waits until next() may succeed; false at the end
//   void store(header, unit, total)      16 bytes of a total
//   void row_done(header)                after the last piece of a row
enum class Next { kReady, kNotYet, kEnd };

template <class Row, bool kWeighted, bool kParts, class Lister>
class SumWork {
 public:
  using Source = SumSource<Row>;

  __device__ SumWork(const Combine& c, Lister& lister, Source* sources)
      : c_(c), lister_(lister), sources_(sources) {}

  __device__ __forceinline__ bool load(Ring& ring, uint32_t stage) {
    if (next_source_ == num_sources_) {
      if (offset_ == c_.args.row_bytes) {
        if (lister_.next(sources_, &num_sources_, &header_) != Next::kReady) {
          next_source_ = num_sources_;
          return false;
        }
        offset_ = 0;
      }
      next_source_ = 0;
    }
    const uint32_t bytes = min(kSumPiece, c_.args.row_bytes - offset_);
    const bool last_source = next_source_ + 1 == num_sources_;
    const bool row_ends = last_source && offset_ + bytes == c_.args.row_bytes;
    if (threadIdx.x % 32 == 0) {
      const Source source = sources_[next_source_];
      SumHeader* header = reinterpret_cast<SumHeader*>(ring.extra(stage));
      *header = header_;
      header->offset = offset_;
      header->factor = source.factor;
      header->flags = source.flags | (next_source_ == 0 ? kFirst : 0) | (last_source ? kLast : 0) |
                      (row_ends ? header_.flags | kRowEnds : 0);
      ptx::mbarrier_arrive_expect_tx(ring.full(stage), bytes);
      ptx::bulk_load(ring.piece(stage), source.row + offset_, bytes, ring.full(stage));
    }
    if (++next_source_ == num_sources_) offset_ += bytes;
    return true;
  }

  __device__ __forceinline__ void store(Ring& ring, uint32_t stage) {
    const SumHeader header = *reinterpret_cast<const SumHeader*>(ring.extra(stage));
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t units = min(kSumPiece, c_.args.row_bytes - header.offset) / 16;
    const auto* piece = reinterpret_cast<const uint4*>(ring.piece(stage));
    const typename Row::Sum factor = static_cast<typename Row::Sum>(header.factor);
    const bool to_part = kParts && (header.flags & kPart) != 0;
#pragma unroll
    for (uint32_t j = 0; j < kSumUnits; ++j) {
      if (header.flags & kFirst) total_[j] = Numbers<Row>::zero();
      if (kParts && (header.flags & kFirstPart)) part_[j] = Numbers<Row>::zero();
      if (lane + 32 * j >= units) continue;
      const uint4 bits = piece[lane + 32 * j];
      if (to_part) {
        add_to(part_[j], bits, factor);
        // Rounded as if it had been sent.
        if (header.flags & kEndPart) total_[j].add_row(part_[j].bits());
      } else {
        add_to(total_[j], bits, factor);
      }
      if (header.flags & kLast)
        lister_.store(header, header.offset + 16 * (lane + 32 * j), total_[j]);
    }
    if (header.flags & kRowEnds) lister_.row_done(header);
  }

  __device__ __forceinline__ bool wait() { return lister_.wait(); }

 private:
  __device__ static void add_to(Numbers<Row>& sum, const uint4& bits, typename Row::Sum factor) {
    if constexpr (kWeighted) {
      sum.add_row(bits, factor);
    } else {
      sum.add_row(bits);
    }
  }

  const Combine& c_;
  Lister& lister_;
  Source* const sources_;  // [R + K], shared, of this warp
  SumHeader header_{};     // of the row that is being loaded
  uint32_t num_sources_ = 0, next_source_ = 0;
  uint32_t offset_ = c_.args.row_bytes;  // of the piece that is being loaded
  Numbers<Row> total_[kSumUnits];
  Numbers<Row> part_[kParts ? kSumUnits : 1];
};

// Expert layout, sending: a row's expert rows are summed and rounded once, and go to the rank of
// the token by ordinary stores.
template <class Row, bool kStaging>
class ExpertSums {
 public:
  __device__ ExpertSums(const Combine& c, uint32_t first, uint32_t step, uint32_t staging_slab)
      : c_(c), sender_(c, staging_slab), at_(c, first, step) {}

  __device__ __forceinline__ Next next(SumSource<Row>* sources, uint32_t* count,
                                       SumHeader* header) {
    do {
      if (row_ == at_.last) {
        if (!at_.advance()) return Next::kEnd;
        if (!opened_ && !sender_.open()) return Next::kEnd;
        opened_ = true;
        row_ = at_.first;
      }
      __syncwarp();
      *count = append_expert_rows<Row>(c_, at_.input + row_, sources, 0, 0, 0, 0);
      __syncwarp();
      header->out = sender_.row(at_.source, row_);
      header->item = row_;
      header->source = at_.source;
      header->flags = row_ + 1 == at_.last ? kChunkEnds : 0;
      if (*count == 0) row_done(*header);  // its choices found no room: nothing to send
      ++row_;
    } while (*count == 0);
    return Next::kReady;
  }

  __device__ bool wait() const { return false; }

  __device__ __forceinline__ void store(const SumHeader& header, uint32_t at,
                                        const Numbers<Row>& total) const {
    ptx::st_once_v4(header.out + at, total.bits());
  }

  __device__ __forceinline__ void row_done(const SumHeader& header) const {
    const uint32_t lane = threadIdx.x % 32;
    if (c_.call.row_weights != nullptr && lane < c_.top_k()) {
      const uint64_t row = c_.first_row(header.source, c_.me()) + header.item;
      const int32_t place = __ldg(c_.call.positions + row * c_.places() + lane);
      c_.copy_weight(sender_.weights(header.source, header.item), lane,
                     place >= 0 ? c_.call.row_weights : nullptr, place);
    }
    if (header.flags & kChunkEnds) sender_.publish(header.source, header.item / kChunkRows);
  }

 private:
  const Combine& c_;
  const ChunkSender<kStaging> sender_;
  ChunkCursor at_;
  uint32_t row_ = 0;
  bool opened_ = false;
};

// Sums the rows of this rank's tokens: what each rank sends, in rank order, then the bias.
template <class Row, bool kExpert, bool kStaging>
class TokenSums {
 public:
  // Blocks `first`, `first + step`, ... of 4 consecutive tokens.
  __device__ TokenSums(const Combine& c, uint32_t first, uint32_t step)
      : c_(c),
        lane_(threadIdx.x % 32),
        slab_(c.slab(c.me(), 0)),
        step_(step),
        token_(first * kBlock) {}

  __device__ __forceinline__ Next next(SumSource<Row>* sources, uint32_t* count,
                                       SumHeader* header) {
    for (; token_ < c_.call.num_tokens; advance()) {
      if (!all_arrived<false>()) return Next::kNotYet;
      __syncwarp();
      *count = list(sources);
      __syncwarp();
      header->out = c_.call.y + uint64_t{token_} * c_.args.row_bytes;
      header->item = token_;
      header->flags = 0;
      if (*count != 0) {
        advance();
        return Next::kReady;
      }
      without_rows(*header);
    }
    return Next::kEnd;
  }

  __device__ __forceinline__ bool wait() {
    return token_ < c_.call.num_tokens && all_arrived<true>();
  }

  __device__ __forceinline__ void store(const SumHeader& header, uint32_t at,
                                        Numbers<Row> total) const {
    if (c_.call.bias != nullptr) {
      const uint8_t* bias = c_.call.bias + uint64_t{header.item} * c_.args.row_bytes;
      total.add_row(ptx::ld_nc_once_v4(bias + at));
    }
    ptx::st_once_v4(header.out + at, total.bits());
  }

  // Each choice's number comes from the rank of its expert.
  __device__ __forceinline__ void row_done(const SumHeader& header) const {
    if (c_.call.row_weights == nullptr || lane_ >= c_.top_k()) return;
    const uint32_t t = header.item, top_k = c_.top_k();
    const int32_t id = c_.call.ids[uint64_t{t} * c_.layout().id_pitch + lane_];
    const uint64_t to = uint64_t{t} * top_k + lane_;
    if (id < 0) return c_.copy_weight(c_.call.token_weights, to, nullptr, 0);
    const uint32_t r = id / c_.per_rank();
    const uint64_t slot = c_.call.slots[uint64_t{t} * c_.num_ranks() + r];
    if (r != c_.me()) {
      const uint8_t* weights = c_.slab_weights(slab_, c_.segment_row(r, slot - c_.first_rows[r]));
      c_.copy_weight(c_.call.token_weights, to, weights, lane_);
    } else if (kExpert) {
      const int32_t place = c_.call.positions[slot * c_.places() + lane_];
      c_.copy_weight(c_.call.token_weights, to, place >= 0 ? c_.call.row_weights : nullptr, place);
    } else {
      const bool there = slot < c_.call.num_rows;
      c_.copy_weight(c_.call.token_weights, to, there ? c_.call.row_weights : nullptr,
                     slot * top_k + lane_);
    }
  }

 private:
  static constexpr uint32_t kBlock = 4;

  __device__ void advance() {
    if (++token_ % kBlock == 0) token_ += (step_ - 1) * kBlock;
  }

  __device__ int32_t slot_of(uint32_t r) const {
    return r < c_.num_ranks() ? __ldg(c_.call.slots + uint64_t{token_} * c_.num_ranks() + r) : -1;
  }

  // Whether the chunks with the rows of `token_` are there; or waits for them, and says false if
  // the rank has failed. Then bulk loads come after the flags, as after dispatch's.
  template <bool kWait>
  __device__ bool all_arrived() {
    bool arrived = true;
    for (uint32_t r = lane_; !kStaging && r < c_.num_ranks(); r += 32) {
      const int32_t slot = slot_of(r);
      if (r == c_.me() || slot < 0) continue;
      const uint32_t chunk = (slot - c_.first_rows[r]) / kChunkRows;
      // A warp meets most chunks several times in a row.
      if ((r < 32 ? seen_low_ : seen_high_) == chunk) continue;
      const uint32_t* flag = c_.chunk_flags(c_.me(), r) + chunk;
      if constexpr (kWait) {
        const WaitSite site{Phase::kCombineRows, c_.me(), r, chunk, c_.epoch};
        arrived = arrived && wait_epoch(flag, c_.epoch, site, c_.watchdog);
      } else {
        arrived = arrived && epoch_reached(ptx::ld_acquire_sys(flag), c_.epoch);
      }
      if (arrived) (r < 32 ? seen_low_ : seen_high_) = chunk;
    }
    const bool all = __all_sync(~0u, arrived) != 0;
    if (all && !kStaging) ptx::fence_proxy_async_global();
    return all;
  }

  // The rows of `token_`, in rank order; this rank's own expert rows in the place of its row.
  __device__ uint32_t list(SumSource<Row>* sources) const {
    uint32_t count = 0;
    for (uint32_t r0 = 0; r0 < c_.num_ranks(); r0 += 32) {
      const uint32_t r = r0 + lane_;
      const int32_t slot = slot_of(r);
      const bool own = r == c_.me();
      const bool there = slot >= 0 && !(own && (kExpert || uint64_t(slot) >= c_.call.num_rows));
      const uint32_t votes = __ballot_sync(~0u, there);
      const uint32_t lower = __ballot_sync(~0u, there && r < c_.me());
      uint32_t own_rows = 0;
      if (kExpert && r0 == c_.me() / 32 * 32) {
        const int32_t own_slot = __shfl_sync(~0u, slot, c_.me() % 32);
        if (own_slot >= 0) {
          const uint32_t from = count + __popc(lower);
          own_rows =
              append_expert_rows<Row>(c_, own_slot, sources, from, kFirstPart, kPart, kEndPart) -
              from;
        }
      }
      if (there) {
        const uint32_t place =
            count + __popc(votes & lanes_below(lane_)) + (kExpert && r > c_.me() ? own_rows : 0);
        const uint8_t* row = own ? c_.input_row(slot)
                                 : c_.slab_row(slab_, c_.segment_row(r, slot - c_.first_rows[r]));
        sources[place] = {row, 1, 0};
      }
      count += __popc(votes) + own_rows;
    }
    return count;
  }

  // Tokens that no rank has rows of: zero, or the bias.
  __device__ void without_rows(const SumHeader& header) const {
    for (uint32_t at = 16 * lane_; at < c_.args.row_bytes; at += 32 * 16) {
      store(header, at, Numbers<Row>::zero());
    }
    row_done(header);
  }

  const Combine& c_;
  const uint32_t lane_;
  uint8_t* const slab_;
  const uint32_t step_;
  uint32_t token_;                             // the next
  uint32_t seen_low_ = ~0u, seen_high_ = ~0u;  // latest chunk of ranks lane and lane + 32
};

}  // namespace dualpipe
