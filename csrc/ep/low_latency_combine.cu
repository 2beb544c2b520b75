// Combine of few tokens: one pass, in which rows wait for nothing.
//
//   every warp   1. row, or sum of expert rows ------> inbox of the token's rank     pieces
//                2. inbox + own rows [+ bias]  ------> y                             pieces
//
// Protocol and ordering are those of low_latency_dispatch.cu; segment s of an inbox holds, in
// order, what rank s sends. Order of a sum: that of combine.cu.
#include "comm/chained_launch.cuh"
#include "comm/launch.cuh"
#include "ep/combine_send.cuh"
#include "ep/low_latency.h"
#include "ep/messages.cuh"
#include "ep/warp_rows.cuh"
#include "ptx/grid.cuh"

namespace dualpipe {
namespace {

constexpr uint32_t kThreads = 512;
// Units of 16 bytes of a row that a lane has to do with at once; of so many ranks, and of so many
// expert rows of one: what the registers have room for.
constexpr uint32_t kUnits = 2, kRanksAtOnce = 2, kExpertsAtOnce = 2;

template <class Row>
using Sums = Numbers<Row>[kUnits];

// What one warp does.
template <class Row, bool kExpert, bool kWeighted>
class PieceWork {
 public:
  __device__ PieceWork(const Combine& c, const RowsBySource& rows)
      : c_(c),
        rows_(rows),
        lane_(threadIdx.x % 32),
        units_(c.args.row_bytes / 16),
        payload_(ceil_div(units_, 32 * kUnits)),
        count_(payload_ + (c.args.weight_bytes != 0 ? 1 : 0)) {}

  __device__ uint32_t count() const { return count_; }

  // Piece `piece` of row `row`, in token layout, of a token of rank `to`.
  __device__ void send(uint32_t row, uint32_t piece, uint32_t to) const {
    const uint64_t in_segment = c_.segment_row(c_.me(), row - rows_.first(to));
    uint8_t* inbox = c_.slab(to, c_.epoch % kInboxes);
    if (piece == payload_) {
      uint8_t* weights = c_.slab_weights(inbox, in_segment);
      return c_.args.weight_bytes == 4 ? send_weights<uint32_t>(weights, row)
                                       : send_weights<uint64_t>(weights, row);
    }
    const LaneUnits units = units_of(piece);
    uint4 v[kUnits];
    own_units(row, units, v);
    uint8_t* out = c_.slab_row(inbox, in_segment);
#pragma unroll
    for (uint32_t j = 0; j < kUnits; ++j) {
      if (units.has(j)) send_unit(out + 16 * units.at(j), v[j]);
    }
  }

  // Piece `piece` of the sum of token `token`. False if the rank has failed.
  __device__ bool sum(uint32_t token, uint32_t piece) const {
    const TokenRows slots(c_.call.slots, token, c_.num_ranks());
    const uint64_t from = slots.ranks();
    if (piece == payload_) {
      return c_.args.weight_bytes == 4 ? take_weights<uint32_t>(token, slots, from)
                                       : take_weights<uint64_t>(token, slots, from);
    }

    const LaneUnits units = units_of(piece);
    const uint64_t at = uint64_t{token} * c_.args.row_bytes;
    uint4 bias[kUnits];
#pragma unroll
    for (uint32_t j = 0; j < kUnits; ++j) {
      const bool there = c_.call.bias != nullptr && units.has(j);
      if (there) bias[j] = ptx::ld_once_v4(c_.call.bias + at + 16 * units.at(j));
    }
    Sums<Row> total;
    if (!sum_over_ranks(units, slots, from, total)) return false;
#pragma unroll
    for (uint32_t j = 0; j < kUnits; ++j) {
      if (!units.has(j)) continue;
      if (c_.call.bias != nullptr) total[j].add_row(bias[j]);
      ptx::st_once_v4(c_.call.y + at + 16 * units.at(j), total[j].bits());
    }
    return true;
  }

 private:
  __device__ LaneUnits units_of(uint32_t piece) const {
    return {piece * 32 * kUnits + lane_, units_};
  }

  // Adds what each rank of `from` has to give, in rank order. Units of several ranks are waited for
  // at once; this rank's own come from its memory.
  __device__ bool sum_over_ranks(const LaneUnits& units, const TokenRows& slots, uint64_t from,
                                 Sums<Row>& total) const {
    uint8_t* const inbox = c_.slab(c_.me(), c_.epoch % kInboxes);
    const uint32_t own_slot = slots.at(c_.me());
    const bool has_own = (from >> c_.me() & 1) != 0;
    uint4 own[kUnits];
    if (has_own) own_units(own_slot, units, own);
    // A row of this rank that there was no room for does not exist.
    if (has_own && !kExpert && own_slot >= c_.call.num_rows) from &= ~(uint64_t{1} << c_.me());
#pragma unroll
    for (uint32_t j = 0; j < kUnits; ++j) total[j] = Numbers<Row>::zero();
    while (from != 0) {
      uint8_t* rows[kRanksAtOnce];
      uint4 v[kRanksAtOnce][kUnits];
      uint32_t sources[kRanksAtOnce], count = 0;
#pragma unroll
      for (uint32_t i = 0; i < kRanksAtOnce; ++i) {
        rows[i] = nullptr;
        if (from == 0) continue;
        const uint32_t rank = __ffsll(from) - 1;
        from &= from - 1;
        ++count;
        if (rank == c_.me()) {
#pragma unroll
          for (uint32_t j = 0; j < kUnits; ++j) v[i][j] = own[j];
          continue;
        }
        const uint32_t slot = slots.at(rank);
        rows[i] = c_.slab_row(inbox, c_.segment_row(rank, slot - c_.first_rows[rank]));
        sources[i] = rank;
      }
      const auto site = [&](uint32_t i) {
        uint32_t source = sources[0];
#pragma unroll
        for (uint32_t s = 1; s < kRanksAtOnce; ++s) source = s == i ? sources[s] : source;
        return WaitSite{Phase::kCombineRows, c_.me(), source, 0, c_.epoch};
      };
      if (!take_units(rows, units, v, c_.watchdog, site)) return false;
#pragma unroll
      for (uint32_t i = 0; i < kRanksAtOnce; ++i) {
#pragma unroll
        for (uint32_t j = 0; j < kUnits; ++j) {
          if (i < count) total[j].add_row(v[i][j]);
        }
      }
    }
    return true;
  }

  // What this rank has to give for a row: the row, or the sum of its expert rows, rounded.
  __device__ void own_units(uint32_t row, const LaneUnits& units, uint4 (&v)[kUnits]) const {
    if constexpr (kExpert) {
      sum_of_experts(row, units, v);
    } else {
      // A row that there was no room for does not exist; anything may be sent instead.
      const uint8_t* in = c_.input_row(min(uint64_t{row}, c_.call.num_rows - 1));
#pragma unroll
      for (uint32_t j = 0; j < kUnits; ++j) {
        if (units.has(j)) v[j] = ptx::ld_once_v4(in + 16 * units.at(j));
      }
    }
  }

  __device__ void sum_of_experts(uint32_t row, const LaneUnits& units, uint4 (&v)[kUnits]) const {
    const int32_t place = place_of(row);
    typename Row::Sum factor = 1;
    // Of the virtual ranks of a launch, some may have factors and others none.
    if (kWeighted && place >= 0 && c_.call.weights != nullptr) {
      factor = static_cast<const typename Row::Sum*>(c_.call.weights)[place];
    }
    Sums<Row> total;
#pragma unroll
    for (uint32_t j = 0; j < kUnits; ++j) total[j] = Numbers<Row>::zero();
    for (uint32_t left = __ballot_sync(~0u, place >= 0); left != 0;) {
      uint4 bits[kExpertsAtOnce][kUnits];
      typename Row::Sum factors[kExpertsAtOnce];
      uint32_t count = 0;
#pragma unroll
      for (uint32_t i = 0; i < kExpertsAtOnce; ++i) {
        if (left == 0) continue;
        const uint32_t k = __ffs(left) - 1;
        left &= left - 1;
        count = i + 1;
        factors[i] = __shfl_sync(~0u, factor, k);
        const uint8_t* in = c_.input_row(__shfl_sync(~0u, place, k));
#pragma unroll
        for (uint32_t j = 0; j < kUnits; ++j) {
          if (units.has(j)) bits[i][j] = ptx::ld_once_v4(in + 16 * units.at(j));
        }
      }
#pragma unroll
      for (uint32_t i = 0; i < kExpertsAtOnce; ++i) {
#pragma unroll
        for (uint32_t j = 0; j < kUnits; ++j) {
          if (i >= count) continue;
          if constexpr (kWeighted) {
            total[j].add_row(bits[i][j], factors[i]);
          } else {
            total[j].add_row(bits[i][j]);
          }
        }
      }
    }
#pragma unroll
    for (uint32_t j = 0; j < kUnits; ++j) v[j] = total[j].bits();
  }

  // Expert layout: row of the input with the choice `lane` of a row in token layout.
  __device__ int32_t place_of(uint32_t row) const {
    if (lane_ >= c_.top_k()) return -1;
    return c_.call.positions[uint64_t{row} * c_.places() + lane_];
  }

  // The number of choice `lane` of a row here; zero, or anything, for choices of other ranks.
  template <class Word>
  __device__ Word own_weight(uint32_t row) const {
    const auto* weights = reinterpret_cast<const Word*>(c_.call.row_weights);
    if constexpr (kExpert) {
      const int32_t place = place_of(row);
      return place >= 0 ? weights[place] : 0;
    } else {
      const bool there = lane_ < c_.top_k() && row < c_.call.num_rows;
      return there ? weights[uint64_t{row} * c_.top_k() + lane_] : 0;
    }
  }

  template <class Word>
  __device__ void send_weights(uint8_t* to, uint32_t row) const {
    const Word word = own_weight<Word>(row);
    if (lane_ < c_.top_k()) send_word(reinterpret_cast<Word*>(to) + lane_, word);
  }

  // Each choice's number comes from the rank of its expert; what other ranks say of it is dropped.
  template <class Word>
  __device__ bool take_weights(uint32_t token, const TokenRows& slots, uint64_t from) const {
    uint8_t* const inbox = c_.slab(c_.me(), c_.epoch % kInboxes);
    int32_t owner = -1;
    if (lane_ < c_.top_k()) {
      const int32_t id = c_.call.ids[uint64_t{token} * c_.layout().id_pitch + lane_];
      if (id >= 0) owner = id / static_cast<int32_t>(c_.per_rank());
    }
    Word number = 0;
    for (; from != 0; from &= from - 1) {
      const uint32_t rank = __ffsll(from) - 1;
      const uint32_t slot = slots.at(rank);
      Word word;
      if (rank == c_.me()) {
        word = own_weight<Word>(slot);
      } else {
        const uint64_t row = c_.segment_row(rank, slot - c_.first_rows[rank]);
        auto* words = reinterpret_cast<Word*>(c_.slab_weights(inbox, row));
        const auto site = [&] { return WaitSite{Phase::kCombineRows, c_.me(), rank, 0, c_.epoch}; };
        Word* at = lane_ < c_.top_k() ? words + lane_ : nullptr;
        if (!take_word(at, &word, c_.watchdog, site)) return false;
      }
      if (owner == int32_t(rank)) number = word;
    }
    if (lane_ < c_.top_k()) {
      reinterpret_cast<Word*>(c_.call.token_weights)[uint64_t{token} * c_.top_k() + lane_] = number;
    }
    return true;
  }

  const Combine& c_;
  const RowsBySource& rows_;
  const uint32_t lane_;
  const uint32_t units_;    // of 16 bytes, of a row
  const uint32_t payload_;  // pieces of a row
  const uint32_t count_;    // with the one for its numbers
};

// As in low_latency_dispatch.cu: rows of peers' tokens first, then sums of this rank's.
template <class Row, bool kExpert, bool kWeighted>
__device__ void run(const Combine& c, const RowsBySource& rows, uint32_t warp, uint32_t warps,
                    bool greets) {
  const PieceWork<Row, kExpert, kWeighted> work(c, rows);
  const uint32_t own = rows.first(c.me()), own_rows = rows.end(c.me()) - own;
  if (greets) c.send_permits(kNoSlab);
  delay(c.call.send_delay_ns);
  const uint32_t sends = (rows.total() - own_rows) * work.count();
  uint32_t item = warp;
  for (; item < sends; item += warps) {
    uint32_t row = item / work.count();
    if (row >= own) row += own_rows;
    work.send(row, item % work.count(), rows.source(row));
  }
  if (greets) c.await_all(Phase::kCombineHello);
  delay(c.call.receive_delay_ns);
  for (item -= sends; item < c.call.num_tokens * work.count(); item += warps) {
    if (!work.sum(item / work.count(), item % work.count())) return;
  }
}

template <class Row, bool kExpert, bool kWeighted>
__global__ void __launch_bounds__(kThreads, 1)
    low_latency_combine_kernel(const __grid_constant__ CombineArgs args) {
  __shared__ int32_t first_rows[kMaxRanks];
  ptx::griddepcontrol_wait();
  const Place place = Place::here(args.launch);
  const CombineCall& call = args.calls[place.local];
  const Watchdog watchdog = make_watchdog(args.launch, place.local, call.rank);
  const Combine c{{args, call, watchdog, watchdog.state->transfer_epoch + 1}, first_rows};
  const RowsBySource rows(call.matrix, c.num_ranks(), c.me());
  if (threadIdx.x < c.num_ranks()) first_rows[threadIdx.x] = c.first_row(c.me(), threadIdx.x);
  if (__syncthreads_or(watchdog.aborted())) return;
  const uint32_t ctas = args.launch.ctas, warps = kThreads / 32 * ctas;
  const uint32_t warp = threadIdx.x / 32 * ctas + place.cta;
  run<Row, kExpert, kWeighted>(c, rows, warp, warps, warp == warps - 1);
  finish_epoch(watchdog.state, &watchdog.state->transfer_epoch, ctas);
}

template <class Row>
cudaError_t launch(const CombineArgs& args, cudaStream_t stream) {
  const auto kernel = args.expert_layout == 0 ? low_latency_combine_kernel<Row, false, false>
                      : args.weighted == 0    ? low_latency_combine_kernel<Row, true, false>
                                              : low_latency_combine_kernel<Row, true, true>;
  return launch_chained(kernel, args.launch.num_local * args.launch.ctas, kThreads, 0, stream,
                        args);
}

}  // namespace

cudaError_t launch_low_latency_combine(const CombineArgs& args, cudaStream_t stream) {
  switch (args.type) {
    case RowType::kF16:
      return launch<F16Row>(args, stream);
    case RowType::kF32:
      return launch<F32Row>(args, stream);
    case RowType::kF64:
      return launch<F64Row>(args, stream);
    default:
      return launch<Bf16Row>(args, stream);
  }
}

}  // namespace dualpipe
