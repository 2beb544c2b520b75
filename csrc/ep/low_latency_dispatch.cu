// Dispatch of few tokens: one pass, in which rows wait for nothing.
//
//   every warp   1. x [-> FP8] ------> inbox of a peer      pieces of this rank's rows
//                              ------> output                   (those that stay)
//                2. zeros      ------> output               rows that nobody sends
//                3. inbox      ------> output               pieces of peers' rows
//
// All warps of all CTAs share one list of pieces, sent ones first: with few tokens a warp has one
// or two. Nothing is staged: what a lane reads is stored from its registers.
//
// Protocol. Words tell of themselves (messages.cuh), so a row has arrived when a receiver sees its
// words, one way across the link after they were read. Two inboxes take turns. In call n
//   words   sender to receiver, into inbox n % 2; the receiver empties what it has taken
//   hello   to every rank: "I am in call n": an epoch, released when the kernel starts
// and a rank ends call n only when it has the hello of every other, also of those that send it
// nothing. That has come by the time that rows have.
//
// Why an inbox is empty when it is written to. Rank b writes to a's inbox in call n + 2. Its call
// n + 1 ended with a's hello of n + 1, which a released after its own call n, at whose end the
// inbox of that parity was empty. Kernels of a stream follow each other, release and acquire make
// it known to b: so b's words come after a's emptying. And b cannot be in call n + 2 while a still
// takes words of call n.
//
// The kernel ends when all rows are where they belong, so the next kernel of the stream may read
// them.
#include "ep/low_latency.h"

#include "comm/chained_launch.cuh"
#include "comm/launch.cuh"
#include "ep/dispatch_rows.cuh"
#include "ep/messages.cuh"
#include "ep/warp_rows.cuh"
#include "ep/zero_rows.cuh"
#include "ptx/grid.cuh"

namespace dualpipe {
namespace {

constexpr uint32_t kThreads = 512;
// Units of 16 bytes that a lane reads at once: of a row that is sent, of one that is received.
constexpr uint32_t kSendUnits = 4, kTakeUnits = 2;

// Where a row of this rank's token layout goes in its output. A warp's: lane k holds the place of
// choice k in expert layout.
class OutputPlaces {
 public:
  __device__ OutputPlaces(const Dispatch& d, uint32_t row) : d_(d), row_(row) {
    const uint32_t lane = threadIdx.x % 32;
    if (d.call.expert_layout != 0 && lane < d.top_k()) {
      place_ = d.call.positions[uint64_t{row} * d.places() + lane];
    }
  }

  // Calls `put` with every row of the output.
  template <class Put>
  __device__ void each(Put put) const {
    if (d_.call.expert_layout == 0) {
      if (row_ < d_.call.num_rows) put(uint64_t{row_});
      return;
    }
    for (uint32_t left = __ballot_sync(~0u, place_ >= 0); left != 0; left &= left - 1) {
      put(static_cast<uint64_t>(__shfl_sync(~0u, place_, __ffs(left) - 1)));
    }
  }

  // The number of choice `lane`, where the output has a place for it.
  template <class Word>
  __device__ void put_weight(Word word) const {
    const uint32_t lane = threadIdx.x % 32;
    Word* out = reinterpret_cast<Word*>(d_.call.out_weights);
    if (d_.call.expert_layout != 0) {
      if (place_ >= 0) out[place_] = word;
    } else if (lane < d_.top_k() && row_ < d_.call.num_rows) {
      out[uint64_t{row_} * d_.top_k() + lane] = word;
    }
  }

 private:
  const Dispatch& d_;
  const uint32_t row_;
  int32_t place_ = -1;
};

__device__ uint8_t* inbox(const Dispatch& d, uint32_t rank) {
  return d.slab(rank, d.epoch % kInboxes);
}

__device__ void put_unit(const Dispatch& d, uint64_t row, uint32_t unit, const uint4& v) {
  ptx::st_once_v4(d.call.out_rows + row * d.call.out_pitch + 16 * unit, v);
}

__device__ void put_scale(const Dispatch& d, uint64_t row, uint32_t i, uint32_t word) {
  reinterpret_cast<uint32_t*>(d.call.out_scales)[row * d.call.out_scale_pitch + i] = word;
}

// Pieces of a row, the last of which are its numbers: the scales that came with it, and weights.
struct Pieces {
  uint32_t units;  // of 16 bytes, of the payload
  uint32_t lane_units;
  uint32_t numbers;  // 1: there are some

  __device__ uint32_t payload() const { return ceil_div(units, 32 * lane_units); }
  __device__ uint32_t count() const { return payload() + numbers; }
};

// --- sending -------------------------------------------------------------------------------------

// Bytes of one lane of a row as it leaves: a piece as it is, or what becomes of it.
template <Payload kPayload>
struct Sent {
  static constexpr bool kQuantizes = kPayload != Payload::kAsIs;
  static constexpr uint32_t kUnits = kQuantizes ? kSendUnits / 2 : kSendUnits;

  uint4 units[kUnits];
  uint32_t at[kUnits];         // unit of the row as it leaves; kNone: none
  float scales[kSendUnits];    // of the blocks that this lane tells of
  uint32_t block[kSendUnits];  // kNone: none

  static constexpr uint32_t kNone = ~0u;
};

// Reads piece `piece` of a row; quantises it: bit for bit what quantize.cuh does. 16 lanes hold a
// block. Neighbours then swap halves, so that each has 16 bytes to store.
template <Payload kPayload>
__device__ Sent<kPayload> read_piece(const uint8_t* row, uint32_t piece, uint32_t units) {
  constexpr uint32_t kBlockUnits = kQuantBlock / 8;
  using Piece = Sent<kPayload>;
  const uint32_t lane = threadIdx.x % 32, first = piece * 32 * kSendUnits;
  uint4 v[kSendUnits];
#pragma unroll
  for (uint32_t i = 0; i < kSendUnits; ++i) {
    const uint32_t unit = first + 32 * i + lane;
    v[i] = unit < units ? ptx::ld_once_v4(row + 16 * unit) : uint4{};
  }
  Piece sent;
  if constexpr (!Piece::kQuantizes) {
#pragma unroll
    for (uint32_t i = 0; i < kSendUnits; ++i) {
      const uint32_t unit = first + 32 * i + lane;
      sent.units[i] = v[i];
      sent.at[i] = unit < units ? unit : Piece::kNone;
    }
  } else {
    uint2 half[kSendUnits];
#pragma unroll
    for (uint32_t i = 0; i < kSendUnits; ++i) {
      const uint32_t unit = first + 32 * i + lane;
      __nv_bfloat162 most = most_of(v[i]);
#pragma unroll
      for (uint32_t step = 1; step < kBlockUnits; step *= 2) {
        most = __hmax2_nan(most, __shfl_xor_sync(~0u, most, step));
      }
      const QuantScale q = quant_scale<kPayload == Payload::kQuantizePow2>(
          __bfloat162float(__hmax_nan(most.x, most.y)));
      half[i] = to_fp8x8(v[i], q.inverse);
      sent.scales[i] = q.scale;
      sent.block[i] = unit < units && unit % kBlockUnits == 0 ? unit / kBlockUnits : Piece::kNone;
    }
    // Even lanes take their pair's values of load i, odd ones those of load i + 1.
    const bool odd = lane % 2 != 0;
#pragma unroll
    for (uint32_t i = 0; i < kSendUnits; i += 2) {
      const uint2 give = odd ? half[i] : half[i + 1];
      const uint2 got = {__shfl_xor_sync(~0u, give.x, 1), __shfl_xor_sync(~0u, give.y, 1)};
      const uint32_t unit = first + 32 * (i + odd) + lane - odd;  // the pair's first, as it is read
      sent.units[i / 2] = odd ? uint4{got.x, got.y, half[i + 1].x, half[i + 1].y}
                              : uint4{half[i].x, half[i].y, got.x, got.y};
      sent.at[i / 2] = unit < units ? unit / 2 : Piece::kNone;
    }
  }
  return sent;
}

// Calls `to_rank` with every rank that the token goes to and its row there: peers first, each rank
// from another one on, then this rank, whose rows have the shortest way.
template <class ToRank>
__device__ __forceinline__ void each_rank(const Dispatch& d, const TokenRows& rows,
                                          ToRank to_rank) {
  const uint64_t goes_to = rows.ranks();
  for (uint32_t i = 1; i <= d.num_ranks(); ++i) {
    const uint32_t to = (d.me() + i) % d.num_ranks();
    if ((goes_to >> to & 1) == 0) continue;
    to_rank(to, rows.at(to));
  }
}

// A piece of a token's row to all ranks it goes to.
template <Payload kPayload>
__device__ void send_piece(const Dispatch& d, uint32_t token, uint32_t piece,
                           const TokenRows& rows) {
  using Piece = Sent<kPayload>;
  const Piece sent = read_piece<kPayload>(d.call.x + uint64_t{token} * d.args.in_bytes, piece,
                                          d.args.in_bytes / 16);
  const auto to_rank = [&](uint32_t to, int32_t row) {
    if (to == d.me()) {
      OutputPlaces(d, row).each([&](uint64_t out) {
#pragma unroll
        for (uint32_t i = 0; i < Piece::kUnits; ++i) {
          if (sent.at[i] != Piece::kNone) put_unit(d, out, sent.at[i], sent.units[i]);
        }
#pragma unroll
        for (uint32_t i = 0; Piece::kQuantizes && i < kSendUnits; ++i) {
          const uint32_t word = __float_as_uint(sent.scales[i]);
          if (sent.block[i] != Piece::kNone) put_scale(d, out, sent.block[i], word);
        }
      });
      return;
    }
    uint8_t* out = d.slab_row(inbox(d, to), row);
#pragma unroll
    for (uint32_t i = 0; i < Piece::kUnits; ++i) {
      if (sent.at[i] != Piece::kNone) send_unit(out + 16 * sent.at[i], sent.units[i]);
    }
    auto* scales = reinterpret_cast<uint32_t*>(d.slab_scales(inbox(d, to), row));
#pragma unroll
    for (uint32_t i = 0; Piece::kQuantizes && i < kSendUnits; ++i) {
      if (sent.block[i] == Piece::kNone) continue;
      send_word(scales + sent.block[i], __float_as_uint(sent.scales[i]));
    }
  };
  each_rank(d, rows, to_rank);
}

// The scales that came with a token's row to all ranks it goes to.
__device__ void send_scales(const Dispatch& d, uint32_t token, const TokenRows& rows) {
  const uint32_t lane = threadIdx.x % 32;
  const auto* words =
      reinterpret_cast<const uint32_t*>(d.call.x_scales) + uint64_t{token} * d.args.num_scales;
  each_rank(d, rows, [&](uint32_t to, int32_t row) {
    if (to == d.me()) {
      OutputPlaces(d, row).each([&](uint64_t out) {
        for (uint32_t i = lane; i < d.args.num_scales; i += 32) {
          put_scale(d, out, i, words[i]);
        }
      });
      return;
    }
    auto* scales = reinterpret_cast<uint32_t*>(d.slab_scales(inbox(d, to), row));
    for (uint32_t i = lane; i < d.args.num_scales; i += 32) send_word(scales + i, words[i]);
  });
}

// The numbers of a token's choices to all ranks it goes to; zero where the choice is of another.
template <class Word>
__device__ void send_weights(const Dispatch& d, uint32_t token, const TokenRows& rows) {
  const uint32_t lane = threadIdx.x % 32;
  Word weight = 0;
  int32_t owner = -1;
  if (lane < d.top_k()) {
    const int32_t id = d.call.ids[uint64_t{token} * d.layout().id_pitch + lane];
    owner = id >= 0 ? id / static_cast<int32_t>(d.per_rank()) : -1;
    weight = reinterpret_cast<const Word*>(d.call.weights)[uint64_t{token} * d.top_k() + lane];
  }
  each_rank(d, rows, [&](uint32_t to, int32_t row) {
    const Word word = owner == int32_t(to) ? weight : 0;
    if (to == d.me()) return OutputPlaces(d, row).put_weight(word);
    auto* words = reinterpret_cast<Word*>(d.slab_weights(inbox(d, to), row));
    if (lane < d.top_k()) send_word(words + lane, word);
  });
}

template <Payload kPayload>
__device__ void send(const Dispatch& d, const Pieces& pieces, uint32_t item) {
  const uint32_t token = item / pieces.count(), piece = item % pieces.count();
  const TokenRows rows(d.call.slots, token, d.num_ranks());
  if (piece < pieces.payload()) return send_piece<kPayload>(d, token, piece, rows);
  if (d.call.x_scales != nullptr) send_scales(d, token, rows);
  if (d.args.weight_bytes == 4) send_weights<uint32_t>(d, token, rows);
  if (d.args.weight_bytes == 8) send_weights<uint64_t>(d, token, rows);
}

// --- receiving -----------------------------------------------------------------------------------

template <class Word, class Site>
__device__ bool take_weights(const Dispatch& d, const OutputPlaces& places, uint8_t* weights,
                             Site site) {
  const uint32_t lane = threadIdx.x % 32;
  Word* const at = lane < d.top_k() ? reinterpret_cast<Word*>(weights) + lane : nullptr;
  Word word;
  if (!take_word(at, &word, d.watchdog, site)) return false;
  places.put_weight(word);
  return true;
}

// Takes a piece of a row of another rank. False if the rank has failed.
__device__ bool take(const Dispatch& d, const Pieces& pieces, uint32_t row, uint32_t piece,
                     uint32_t source) {
  const uint32_t lane = threadIdx.x % 32;
  uint8_t* const own = inbox(d, d.me());
  const OutputPlaces places(d, row);
  const auto site = [&] { return WaitSite{Phase::kDispatchRows, d.me(), source, row, d.epoch}; };
  if (piece < pieces.payload()) {
    uint8_t* const rows[1] = {d.slab_row(own, row)};
    const LaneUnits units{piece * 32 * kTakeUnits + lane, pieces.units};
    uint4 v[1][kTakeUnits];
    if (!take_units(rows, units, v, d.watchdog, [&](uint32_t) { return site(); })) return false;
    places.each([&](uint64_t out) {
#pragma unroll
      for (uint32_t j = 0; j < kTakeUnits; ++j) {
        if (units.has(j)) put_unit(d, out, units.at(j), v[0][j]);
      }
    });
    return true;
  }
  auto* scales = reinterpret_cast<uint32_t*>(d.slab_scales(own, row));
  for (uint32_t i0 = 0; i0 < d.args.num_scales; i0 += 32) {
    const uint32_t i = i0 + lane;
    uint32_t word;
    if (!take_word(i < d.args.num_scales ? scales + i : nullptr, &word, d.watchdog, site)) {
      return false;
    }
    places.each([&](uint64_t out) {
      if (i < d.args.num_scales) put_scale(d, out, i, word);
    });
  }
  if (d.args.weight_bytes == 0) return true;
  uint8_t* const weights = d.slab_weights(own, row);
  return d.args.weight_bytes == 4 ? take_weights<uint32_t>(d, places, weights, site)
                                  : take_weights<uint64_t>(d, places, weights, site);
}

// Takes the pieces that fall to a warp: the first of them is number `item`, then every `step`-th.
// Rows of peers are those before this rank's own, and those behind.
__device__ void take_all(const Dispatch& d, const RowsBySource& rows, const Pieces& pieces,
                         uint32_t item, uint32_t step) {
  const uint32_t own = rows.first(d.me()), own_end = rows.end(d.me());
  const uint32_t count = (rows.total() - (own_end - own)) * pieces.count();
  for (; item < count; item += step) {
    uint32_t row = item / pieces.count();
    if (row >= own) row += own_end - own;
    if (!take(d, pieces, row, item % pieces.count(), rows.source(row))) return;
  }
}

template <Payload kPayload>
__global__ void __launch_bounds__(kThreads, 1)
    low_latency_dispatch_kernel(const __grid_constant__ DispatchArgs args) {
  ptx::griddepcontrol_wait();
  const Place place = Place::here(args.launch);
  const DispatchCall& call = args.calls[place.local];
  const Watchdog watchdog = make_watchdog(args.launch, place.local, call.rank);
  const Dispatch d{{args, call, watchdog, watchdog.state->transfer_epoch + 1}};
  const RowsBySource rows(call.matrix, d.num_ranks(), d.me());
  if (__syncthreads_or(watchdog.aborted())) return;
  const uint32_t ctas = args.launch.ctas, warps = kThreads / 32 * ctas;
  const uint32_t warp = threadIdx.x / 32 * ctas + place.cta;
  const bool greets = warp == warps - 1;
  if (greets) d.send_permits(kNoSlab);

  const bool weighs = args.weight_bytes != 0;  // its tensor has no address where it is empty
  const Pieces sent{args.in_bytes / 16, kSendUnits, weighs || call.x_scales != nullptr ? 1u : 0u};
  const Pieces taken{args.out_bytes / 16, kTakeUnits, weighs || args.num_scales != 0 ? 1u : 0u};
  const uint32_t sends = call.num_tokens * sent.count();
  delay(call.send_delay_ns);
  uint32_t item = warp;
  for (; item < sends; item += warps) send<kPayload>(d, sent, item);
  if (greets) d.await_all(Phase::kDispatchHello);
  ZeroRows(d, warp, warps).run();
  delay(call.receive_delay_ns);
  take_all(d, rows, taken, item - sends, warps);
  finish_epoch(watchdog.state, &watchdog.state->transfer_epoch, ctas);
}

}  // namespace

cudaError_t launch_low_latency_dispatch(const DispatchArgs& args, cudaStream_t stream) {
  const auto kernel =
      args.payload == Payload::kQuantize       ? low_latency_dispatch_kernel<Payload::kQuantize>
      : args.payload == Payload::kQuantizePow2 ? low_latency_dispatch_kernel<Payload::kQuantizePow2>
                                               : low_latency_dispatch_kernel<Payload::kAsIs>;
  return launch_chained(kernel, args.launch.num_local * args.launch.ctas, kThreads, 0, stream,
                        args);
}

}  // namespace dualpipe
