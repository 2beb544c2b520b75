// The warps of a combine that sum rows: on the rank of the experts, to be sent, and on the rank of
// the tokens. See combine.cu for the protocol.
#pragma once

#include <cstdint>

#include "ep/combine_send.cuh"

namespace dualpipe {

// A row to be summed.
template <class Row>
struct SumSource {
  const uint8_t* row;
  typename Row::Sum factor;
};

// How many units of 16 bytes of how many rows a lane loads at once: enough to be in flight to hide
// the way to memory, few enough for the registers.
struct SumShape {
  uint32_t units, rows;
};
inline constexpr SumShape kTokenShape{4, 2};   // token layout: a row of each rank
inline constexpr SumShape kExpertShape{2, 5};  // expert layout: own expert rows, and their sum
inline constexpr SumShape kSentShape{3, 4};    // expert layout, sending

// Adds the rows of sources [first, last), in this order, to `total`: units `unit`, `unit + 32`, ...
template <class Row, bool kWeighted, uint32_t kUnits, uint32_t kRows>
__device__ __forceinline__ void add_rows(const SumSource<Row>* sources, uint32_t first,
                                         uint32_t last, uint32_t unit, uint32_t units,
                                         Numbers<Row> (&total)[kUnits]) {
  for (uint32_t s = first; s < last; s += kRows) {
    uint4 bits[kRows][kUnits];
#pragma unroll
    for (uint32_t i = 0; i < kRows; ++i) {
      if (s + i >= last) continue;
      const uint8_t* row = sources[s + i].row;
#pragma unroll
      for (uint32_t j = 0; j < kUnits; ++j) {
        if (unit + 32 * j < units) bits[i][j] = ptx::ld_once_v4(row + 16 * (unit + 32 * j));
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < kRows; ++i) {
      if (s + i >= last) continue;
#pragma unroll
      for (uint32_t j = 0; j < kUnits; ++j) {
        if constexpr (kWeighted) {
          total[j].add_row(bits[i][j], sources[s + i].factor);
        } else {
          total[j].add_row(bits[i][j]);
        }
      }
    }
  }
}

// What the copy-engine path sums has all come, and its warps wait for memory only: they call the
// rows of a token to L2 at once, so that the first loads alone wait long.
template <class Row>
__device__ void call_to_l2(const SumSource<Row>* sources, uint32_t count, uint32_t row_bytes) {
  for (uint32_t s = threadIdx.x % 32; s < count; s += 32) {
    ptx::bulk_prefetch(sources[s].row, row_bytes);
  }
}

// The expert rows of one row in token layout, in top-k order, appended to `sources`; returns the
// new count. Lane k holds choice k.
template <class Row>
__device__ uint32_t append_expert_rows(const Combine& c, uint64_t row, SumSource<Row>* sources,
                                       uint32_t count) {
  const uint32_t lane = threadIdx.x % 32;
  const int32_t place = lane < c.top_k() ? __ldg(c.call.positions + row * c.places() + lane) : -1;
  const uint32_t here = __ballot_sync(~0u, place >= 0);
  if (place >= 0) {
    const auto* weights = static_cast<const typename Row::Sum*>(c.call.weights);
    sources[count + __popc(here & lanes_below(lane))] = {
        c.input_row(place), weights != nullptr ? __ldg(weights + place) : 1};
  }
  return count + __popc(here);
}

// Expert layout, sending: a row's expert rows are summed, rounded once, and go to the rank of the
// token by ordinary stores.
template <class Row, bool kWeighted, bool kStaging>
__device__ void send_sums(const Combine& c, const WorkQueue& queue, const StagedPart& staged,
                          SumSource<Row>* sources) {
  constexpr uint32_t kUnits = kSentShape.units;
  const ChunkSender<kStaging> sender(c, staged.staging_slab);
  const uint32_t units = c.args.row_bytes / 16, lane = threadIdx.x % 32;
  ChunkCursor cursor(c, queue, kStaging ? staged.part : SegmentPart::whole());
  if (!sender.open()) return;
  for (Chunk at; cursor.advance(&at);) {
    for (uint32_t i = at.first; i < at.last; ++i) {
      __syncwarp();
      const uint32_t count = append_expert_rows(c, at.input + i, sources, 0);
      __syncwarp();
      if (kStaging) call_to_l2(sources, count, c.args.row_bytes);
      uint8_t* out = sender.row(at.source, i);
      for (uint32_t unit0 = 0; unit0 < units; unit0 += 32 * kUnits) {
        const uint32_t unit = unit0 + lane;
        Numbers<Row> total[kUnits];
#pragma unroll
        for (uint32_t j = 0; j < kUnits; ++j) total[j] = Numbers<Row>::zero();
        add_rows<Row, kWeighted, kUnits, kSentShape.rows>(sources, 0, count, unit, units, total);
#pragma unroll
        for (uint32_t j = 0; j < kUnits; ++j) {
          if (unit + 32 * j < units) ptx::st_once_v4(out + 16 * (unit + 32 * j), total[j].bits());
        }
      }
      if (c.call.row_weights != nullptr && lane < c.top_k()) {
        const int32_t place = __ldg(c.call.positions + (at.input + i) * c.places() + lane);
        c.copy_weight(sender.weights(at.source, i), lane, place >= 0 ? c.call.row_weights : nullptr,
                      place);
      }
    }
    sender.publish(at.source, at.index);
  }
}

// Sums the rows of this rank's tokens: what each rank sends, in rank order, then the bias.
template <class Row, bool kExpert, bool kWeighted, bool kStaging>
class TokenSums {
 public:
  __device__ TokenSums(const Combine& c, SumSource<Row>* sources)
      : c_(c), sources_(sources), lane_(threadIdx.x % 32), slab_(c.slab(c.me(), 0)) {}

  // The tokens that the queue hands out; of what the copy engines bring, those whose last rows
  // have come with that part.
  __device__ void run(WorkQueue queue, const SegmentPart& part) {
    const uint32_t first = kStaging ? c_.tokens_of_units(part.first) : 0;
    const uint32_t end = kStaging ? c_.tokens_of_units(part.last) : c_.call.num_tokens;
    for (uint32_t t; (t = first + queue.take()) < end;) {
      if (!token(t, queue)) return;
    }
  }

 private:
  static constexpr uint32_t kUnits = (kExpert ? kExpertShape : kTokenShape).units;
  static constexpr uint32_t kRows = (kExpert ? kExpertShape : kTokenShape).rows;
  // Whether the bias is loaded before the rows, to come while they are summed. In token layout the
  // registers are needed for rows.
  static constexpr bool kBiasAhead = kExpert;

  // A token's sources: those of lower ranks, this rank's own expert rows, those of higher ranks.
  struct List {
    uint32_t own, higher, end;  // where each kind starts
  };

  // False if the rank has failed. Asks for the next token only near the end of this one: what a
  // warp has been given, no other can take over.
  __device__ bool token(uint32_t t, WorkQueue& queue) {
    List list;
    __syncwarp();  // the sources of the token before have been read
    if (!gather(t, &list)) return false;
    __syncwarp();
    if (kStaging) call_to_l2(sources_, list.end, c_.args.row_bytes);
    const uint32_t units = c_.args.row_bytes / 16;
    const uint64_t row = uint64_t{t} * c_.args.row_bytes;
    const bool has_bias = c_.call.bias != nullptr;
    for (uint32_t unit0 = 0; unit0 < units; unit0 += 32 * kUnits) {
      if (unit0 + 32 * kUnits >= units) queue.ask();
      const uint32_t unit = unit0 + lane_;
      Numbers<Row> total[kUnits];
      uint4 bias[kUnits];
#pragma unroll
      for (uint32_t j = 0; j < kUnits; ++j) {
        total[j] = Numbers<Row>::zero();
        const bool now = kBiasAhead && has_bias && unit + 32 * j < units;
        if (now) bias[j] = ptx::ld_nc_once_v4(c_.call.bias + row + 16 * (unit + 32 * j));
      }
      sum(list, unit, units, total);
#pragma unroll
      for (uint32_t j = 0; j < kUnits; ++j) {
        if (unit + 32 * j >= units) continue;
        const uint64_t at = row + 16 * (unit + 32 * j);
        if (!kBiasAhead && has_bias) bias[j] = ptx::ld_nc_once_v4(c_.call.bias + at);
        if (has_bias) total[j].add_row(bias[j]);
        ptx::st_once_v4(c_.call.y + at, total[j].bits());
      }
    }
    if (c_.call.row_weights != nullptr) take_weights(t);
    return true;
  }

  __device__ __forceinline__ void sum(const List& list, uint32_t unit, uint32_t units,
                                      Numbers<Row> (&total)[kUnits]) const {
    if constexpr (kExpert) {
      // This rank's part first: rounded, as if it had been sent, it takes few registers.
      uint4 part[kUnits];
      add_rows<Row, kWeighted, kUnits, kRows>(sources_, list.own, list.higher, unit, units, total);
#pragma unroll
      for (uint32_t j = 0; j < kUnits; ++j) {
        part[j] = total[j].bits();
        total[j] = Numbers<Row>::zero();
      }
      add_rows<Row, false, kUnits, 1>(sources_, 0, list.own, unit, units, total);
      if (list.own < list.higher) {
#pragma unroll
        for (uint32_t j = 0; j < kUnits; ++j) total[j].add_row(part[j]);
      }
      add_rows<Row, false, kUnits, 1>(sources_, list.higher, list.end, unit, units, total);
    } else {
      add_rows<Row, false, kUnits, kRows>(sources_, 0, list.end, unit, units, total);
    }
  }

  // Lists the rows of a token once they are there. Lane l looks at ranks l and l + 32.
  __device__ bool gather(uint32_t t, List* list) {
    const uint32_t ranks = c_.num_ranks(), me = c_.me();
    const int32_t* slots = c_.call.slots + uint64_t{t} * ranks;
    const int32_t own_slot = __ldg(slots + me);
    uint32_t count = 0;
    bool arrived = true;
    // Lower ranks (and, in token layout, this one), then higher ones; own expert rows between them.
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t from = half == 0 ? 0 : me + 1;
      const uint32_t to = half == 0 ? (kExpert ? me : me + 1) : ranks;
      for (uint32_t r0 = from; r0 < to; r0 += 32) {
        const uint32_t r = r0 + lane_;
        const int32_t slot = r < to ? __ldg(slots + r) : -1;
        const bool own = r == me;
        // A row that there was no room for does not exist.
        const bool there = slot >= 0 && !(own && uint64_t(slot) >= c_.call.num_rows);
        const uint32_t votes = __ballot_sync(~0u, there);
        if (there) {
          const uint32_t i = own ? 0 : slot - c_.first_rows[r];
          if (!own) arrived = arrived && wait_for(r, c_.chunk_of(i));
          sources_[count + __popc(votes & lanes_below(lane_))] = {
              own ? c_.input_row(slot) : c_.slab_row(slab_, c_.segment_row(r, i)), 1};
        }
        count += __popc(votes);
      }
      if (half == 0) {
        list->own = count;
        if (kExpert && own_slot >= 0) count = append_expert_rows(c_, own_slot, sources_, count);
        list->higher = count;
      }
    }
    list->end = count;
    return __all_sync(~0u, arrived) != 0;
  }

  // One lane for itself. A warp meets most chunks several times in a row.
  __device__ bool wait_for(uint32_t source, uint32_t chunk) {
    if (kStaging) return true;
    if (source == seen_source_ && chunk == seen_chunk_) return true;
    const WaitSite site{Phase::kCombineRows, c_.me(), source, chunk, c_.epoch};
    if (!wait_epoch(c_.run_flags(c_.me(), source) + chunk, c_.epoch, site, c_.watchdog)) {
      return false;
    }
    seen_source_ = source;
    seen_chunk_ = chunk;
    return true;
  }

  // Each choice's number comes from the rank of its expert.
  __device__ void take_weights(uint32_t t) const {
    if (lane_ >= c_.top_k()) return;
    const uint32_t top_k = c_.top_k();
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

  const Combine& c_;
  SumSource<Row>* const sources_;  // [R + K], shared, of this warp
  const uint32_t lane_;
  uint8_t* const slab_;
  uint32_t seen_source_ = ~0u, seen_chunk_ = ~0u;  // latest chunk that was waited for
};

}  // namespace dualpipe
