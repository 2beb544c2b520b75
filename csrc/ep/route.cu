// Routing: from every rank's expert ids to the place of every row. One launch, no host in between.
//
//   1. push   CTA p sends part p of this rank's ids, and what that part needs, to every rank;
//             then a flag
//   2. wait   for the flags of all parts of all ranks: from here on every rank knows every token's
//             experts, and computes for itself what it needs, without another message
//   3. jobs   spread over the CTAs:
//             send(p)        rows that the tokens of part p get at each rank
//             receive(s, p)  rows, and places in the expert layout, of what part p of rank s sends
//             summary        totals, and what is wrong with the call, for the host
//
// All places come from prefix sums in a fixed order: no atomic decides one.
//
// Ordering. Plain stores of ids and counts, __syncthreads, release store of the part's flag;
// acquire load of the flag, __syncthreads, plain loads. The exchanged arrays exist twice: route n +
// 2 writes what route n read, and comes after route n + 1, which ends only when every rank has
// begun it, that is, has finished route n.
#include "comm/launch.cuh"
#include "ep/route.h"
#include "ep/scan.cuh"
#include "ptx/memory.cuh"

namespace dualpipe {
namespace {

constexpr uint32_t kThreads = 512;
constexpr uint32_t kWarps = kThreads / 32;

// What one CTA needs to know everywhere; `me` is the rank it acts for.
struct Router {
  const LaunchArgs& launch;
  const RouteCall& call;
  uint32_t me;
  uint32_t turn;  // which of the two exchanged arrays

  __device__ uint32_t num_ranks() const { return launch.peers.num_ranks; }
  __device__ uint32_t top_k() const { return static_cast<uint32_t>(launch.layout.shape.top_k); }
  __device__ uint32_t num_experts() const {
    return static_cast<uint32_t>(launch.layout.shape.num_experts);
  }
  __device__ uint32_t num_local() const { return num_experts() / num_ranks(); }

  // Ids of rank `source`, in the memory of rank `at`.
  __device__ int16_t* ids(uint32_t at, uint32_t source) const {
    const auto& layout = launch.layout;
    return layout.ids.in(launch.peers.base[at]) +
           (uint64_t{turn} * num_ranks() + source) * layout.shape.max_tokens * layout.id_pitch;
  }
  __device__ int32_t* counts(uint32_t at, uint32_t source, uint32_t part) const {
    const auto& layout = launch.layout;
    const uint64_t row = (uint64_t{turn} * num_ranks() + source) * kRouteParts + part;
    return layout.counts.in(launch.peers.base[at]) + row * layout.count_pitch;
  }
  // Tokens of part `part` of rank `source` that have an expert on rank `to`; after the exchange.
  __device__ int32_t sent(uint32_t source, uint32_t part, uint32_t to) const {
    return counts(me, source, part)[RouteCounts::kHeader + to];
  }
  // Choices of expert `expert` in that part.
  __device__ int32_t chosen(uint32_t source, uint32_t part, uint32_t expert) const {
    return counts(me, source, part)[RouteCounts::kHeader + num_ranks() + expert];
  }
  __device__ int32_t header(uint32_t source, uint32_t part, uint32_t which) const {
    return counts(me, source, part)[which];
  }
};

// 1. Sends part `part` of this rank's ids to every rank. `numbers` is [count_pitch], shared.
__device__ void push_part(const Router& r, uint32_t part, int32_t* numbers, uint32_t epoch) {
  const auto& layout = r.launch.layout;
  const uint32_t num_ranks = r.num_ranks(), top_k = r.top_k();
  const uint32_t pitch = static_cast<uint32_t>(layout.count_pitch);
  for (uint32_t i = threadIdx.x; i < pitch; i += kThreads) numbers[i] = 0;
  __syncthreads();

  const uint32_t size = part_tokens(r.call.num_tokens);
  const uint32_t end = min((part + 1) * size, r.call.num_tokens);
  for (uint32_t t = part * size + threadIdx.x; t < end; t += kThreads) {
    uint64_t goes_to = 0;
    for (uint32_t k0 = 0; k0 < layout.id_pitch; k0 += 8) {
      alignas(16) int16_t packed[8];
#pragma unroll
      for (uint32_t j = 0; j < 8; ++j) {
        packed[j] = -1;
        if (k0 + j >= top_k) continue;
        const int64_t id = r.call.topk_idx[uint64_t{t} * top_k + k0 + j];
        if (id < 0 || id >= r.num_experts()) {
          if (id != -1) atomicAdd(&numbers[RouteCounts::kBadIds], 1);
          continue;
        }
        packed[j] = static_cast<int16_t>(id);
        atomicAdd(&numbers[RouteCounts::kHeader + num_ranks + id], 1);
        goes_to |= uint64_t{1} << (static_cast<uint32_t>(id) / r.num_local());
      }
      const uint64_t at = uint64_t{t} * layout.id_pitch + k0;
      const uint4 all = *reinterpret_cast<const uint4*>(packed);
      *reinterpret_cast<uint4*>(r.call.ids + at) = all;
      for (uint32_t to = 0; to < num_ranks; ++to) {
        *reinterpret_cast<uint4*>(r.ids(to, r.me) + at) = all;
      }
    }
    for (; goes_to != 0; goes_to &= goes_to - 1) {
      atomicAdd(&numbers[RouteCounts::kHeader + __ffsll(goes_to) - 1], 1);
    }
  }
  if (threadIdx.x == 0) {
    numbers[RouteCounts::kTokens] = r.call.num_tokens;
    numbers[RouteCounts::kLayout] = r.call.expert_layout;
    numbers[RouteCounts::kAlignment] = r.call.alignment;
    numbers[RouteCounts::kMaxRows] = r.call.max_rows;
    numbers[RouteCounts::kZeroCopy] = r.call.zero_copy;
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < num_ranks * pitch; i += kThreads) {
    r.counts(i / pitch, r.me, part)[i % pitch] = numbers[i % pitch];
  }
  __syncthreads();
  for (uint32_t to = threadIdx.x; to < num_ranks; to += kThreads) {
    uint32_t* flags = layout.control.route_flags.in(r.launch.peers.base[to]);
    ptx::st_release_sys(&flags[r.me * kRouteParts + part], epoch);
  }
}

// 2. All threads alike: false if the rank has failed.
__device__ bool wait_for_all(const Router& r, uint32_t epoch, const Watchdog& watchdog) {
  const uint32_t* flags = r.launch.layout.control.route_flags.in(r.launch.peers.base[r.me]);
  bool arrived = true;
  for (uint32_t i = threadIdx.x; i < r.num_ranks() * kRouteParts; i += kThreads) {
    const uint32_t source = i / kRouteParts;
    const WaitSite site{Phase::kRoute, r.me, source, i % kRouteParts, epoch};
    arrived = arrived && wait_epoch(&flags[i], epoch, site, watchdog);
  }
  return __syncthreads_and(arrived);
}

// 3a. Rows of the tokens of part `part` at each rank: those of lower ranks and of earlier parts
// come first. `next` and `first` are [R], `in_warp` [kWarps, R]; all shared.
__device__ void send_job(const Router& r, uint32_t part, int32_t* next, int32_t* first,
                         int32_t* in_warp) {
  const uint32_t num_ranks = r.num_ranks();
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x < num_ranks) {
    int32_t before = 0;
    for (uint32_t i = 0; i < r.me * kRouteParts + part; ++i) {
      if (i == r.me * kRouteParts) first[threadIdx.x] = before;
      before += r.sent(i / kRouteParts, i % kRouteParts, threadIdx.x);
    }
    if (part == 0) first[threadIdx.x] = before;
    next[threadIdx.x] = before;
  }
  const uint32_t size = part_tokens(r.call.num_tokens);
  const uint32_t end = min((part + 1) * size, r.call.num_tokens);
  const uint32_t unit = unit_rows(static_cast<uint32_t>(r.launch.layout.shape.max_tokens));
  for (uint32_t t0 = part * size; t0 < end; t0 += kThreads) {
    const uint32_t t = t0 + threadIdx.x;
    uint64_t goes_to = 0;
    for (uint32_t k = 0; t < end && k < r.top_k(); ++k) {
      const int id = r.ids(r.me, r.me)[uint64_t{t} * r.launch.layout.id_pitch + k];
      if (id >= 0) goes_to |= uint64_t{1} << (id / r.num_local());
    }
    for (uint32_t to = 0; to < num_ranks; ++to) {
      const uint32_t votes = __ballot_sync(~0u, (goes_to >> to) & 1);
      if (lane == 0) in_warp[warp * num_ranks + to] = __popc(votes);
    }
    __syncthreads();
    if (threadIdx.x < num_ranks) {
      next[threadIdx.x] = running_sum(in_warp + threadIdx.x, kWarps, num_ranks, next[threadIdx.x]);
    }
    __syncthreads();
    for (uint32_t to = 0; to < num_ranks; ++to) {
      const uint32_t votes = __ballot_sync(~0u, (goes_to >> to) & 1);
      const int32_t row = in_warp[warp * num_ranks + to] + __popc(votes & lanes_below(lane));
      const bool goes = (goes_to >> to) & 1;
      if (t < end) r.call.slots[uint64_t{t} * num_ranks + to] = goes ? row : -1;
      const uint32_t i = row - first[to];
      if (goes && r.call.unit_tokens != nullptr && i % unit == 0) {
        r.call.unit_tokens[i / unit * num_ranks + to] = t;
      }
    }
    __syncthreads();
  }
}

// Rows of the local experts: where each group starts for what (source, part) sends, in `next` [G],
// shared. The CTA that asks for the very first part also writes counts and offsets.
__device__ void expert_starts(const Router& r, uint32_t source, uint32_t part, int32_t* next,
                              int32_t* ends) {
  const uint32_t num_local = r.num_local(), first = r.me * num_local;
  const uint32_t here = source * kRouteParts + part;
  for (uint32_t e = threadIdx.x; e < num_local; e += kThreads) {
    int32_t total = 0, before = 0;
#pragma unroll 4
    for (uint32_t i = 0; i < r.num_ranks() * kRouteParts; ++i) {
      const int32_t n = r.chosen(i / kRouteParts, i % kRouteParts, first + e);
      total += n;
      before += i < here ? n : 0;
    }
    next[e] = before;
    ends[e] = (total + r.call.alignment - 1) / r.call.alignment * r.call.alignment;
    if (here == 0) r.call.counts[e] = total;
  }
  __syncthreads();
  if (threadIdx.x < 32) inclusive_scan_by_warp(ends, num_local);
  __syncthreads();
  const int64_t room = static_cast<int64_t>(r.call.num_rows);
  for (uint32_t e = threadIdx.x; e < num_local; e += kThreads) {
    const int32_t start = e == 0 ? 0 : ends[e - 1];
    next[e] += start;
    if (here == 0 && r.call.offsets != nullptr) {
      // Rows that there is no room for were never written: nobody may be led to them.
      r.call.offsets[e] = static_cast<int32_t>(max(min(int64_t{ends[e]}, room), int64_t{0}));
      r.call.counts[e] = max(min(r.call.counts[e], room - start), int64_t{0});
    }
  }
  __syncthreads();
}

// Shared memory of a receive job.
struct ReceiveScratch {
  int32_t* next;       // [G]          row that the next choice of each expert gets
  int32_t* per_warp;   // [kWarps, G]  likewise, of each warp within a tile; first the group ends
  int32_t* token_row;  // [kThreads]   row of each token of the tile, -1 for none
  int32_t* warp_sums;  // [kWarps]
};

// Places in the expert layout of the choices of one tile of tokens, in (token, choice) order.
__device__ void place_tile(const Router& r, const ReceiveScratch& s, const int16_t* ids,
                           uint32_t num_tokens) {
  const uint32_t num_local = r.num_local(), top_k = r.top_k();
  const int32_t first = r.me * num_local;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t pitch = static_cast<uint32_t>(r.launch.layout.id_pitch);
  int32_t* mine = s.per_warp + warp * num_local;
  for (uint32_t i = threadIdx.x; i < kWarps * num_local; i += kThreads) s.per_warp[i] = 0;
  __syncthreads();
  // How many of each expert every warp has; a sum, so its order does not matter.
  for (uint32_t k = 0; threadIdx.x < num_tokens && k < top_k; ++k) {
    const uint32_t expert = ids[threadIdx.x * pitch + k] - first;
    if (expert < num_local) atomicAdd(&mine[expert], 1);
  }
  __syncthreads();
  for (uint32_t e = threadIdx.x; e < num_local; e += kThreads) {
    s.next[e] = running_sum(s.per_warp + e, kWarps, num_local, s.next[e]);
  }
  __syncthreads();
  // A warp walks the choices of its 32 tokens in order, 32 at a time.
  const uint32_t places = round_up(top_k, 4);
  for (uint32_t i = lane; i < 32 * top_k; i += 32) {
    const uint32_t token = warp * 32 + i / top_k, k = i % top_k;
    uint32_t expert = num_local;
    if (token < num_tokens) expert = min(uint32_t(ids[token * pitch + k] - first), num_local);
    const uint32_t same = __match_any_sync(~0u, expert);
    int32_t place = -1;
    if (expert < num_local) place = mine[expert] + __popc(same & lanes_below(lane));
    __syncwarp();
    if (expert < num_local && (same & lanes_below(lane)) == 0) mine[expert] += __popc(same);
    __syncwarp();
    if (token >= num_tokens || s.token_row[token] < 0) continue;
    if (static_cast<uint64_t>(place) >= r.call.num_rows) place = -1;
    r.call.positions[uint64_t(s.token_row[token]) * places + k] = place;
  }
}

// 3b. What part `part` of rank `source` sends to this rank.
__device__ void receive_job(const Router& r, uint32_t source, uint32_t part,
                            const ReceiveScratch& s) {
  const uint32_t top_k = r.top_k(), num_local = r.num_local();
  const int32_t first = r.me * num_local;
  const uint32_t pitch = static_cast<uint32_t>(r.launch.layout.id_pitch);
  const uint64_t max_starts = r.launch.layout.control.runs + 1;
  int32_t* run_starts = r.call.run_starts + source * max_starts;
  const bool expert_layout = r.call.expert_layout != 0;
  if (expert_layout || source + part == 0) expert_starts(r, source, part, s.next, s.per_warp);

  int32_t before = 0;
  for (uint32_t i = threadIdx.x; i < source * kRouteParts + part; i += kThreads) {
    before += r.sent(i / kRouteParts, i % kRouteParts, r.me);
  }
  int32_t row0 = block_sum<kWarps>(before, s.warp_sums);

  const uint32_t num_tokens = r.header(source, 0, RouteCounts::kTokens);
  const uint32_t run = run_tokens(num_tokens), size = part_tokens(num_tokens);
  const uint32_t end = min((part + 1) * size, num_tokens);
  for (uint32_t t0 = part * size; t0 < end; t0 += kThreads) {
    const uint32_t t = t0 + threadIdx.x;
    const int16_t* ids = r.ids(r.me, source) + uint64_t{t0} * pitch;
    bool here = false;
    for (uint32_t k = 0; t < end && k < top_k; ++k) {
      here |= uint32_t(ids[threadIdx.x * pitch + k] - first) < num_local;
    }
    int32_t total;
    const int32_t row = row0 + block_exclusive_count<kWarps>(here, s.warp_sums, &total);
    s.token_row[threadIdx.x] = here ? row : -1;
    if (t < end && t % run == 0) run_starts[t / run] = row;
    if (here && r.call.topk_local != nullptr && uint64_t(row) < r.call.num_rows) {
      for (uint32_t k = 0; k < top_k; ++k) {
        const uint32_t expert = ids[threadIdx.x * pitch + k] - first;
        r.call.topk_local[uint64_t(row) * top_k + k] = expert < num_local ? int64_t{expert} : -1;
      }
    }
    __syncthreads();
    if (expert_layout) place_tile(r, s, ids, min(end - t0, kThreads));
    __syncthreads();
    row0 += total;
  }
  if (part + 1 == kRouteParts && threadIdx.x == 0) run_starts[ceil_div(num_tokens, run)] = row0;
}

// Rows of the output that no token fills have no experts.
__device__ void clear_unused_ids(const Router& r, uint32_t cta, int32_t* warp_sums) {
  if (r.call.topk_local == nullptr) return;
  int32_t rows = 0;
  for (uint32_t i = threadIdx.x; i < r.num_ranks() * kRouteParts; i += kThreads) {
    rows += r.sent(i / kRouteParts, i % kRouteParts, r.me);
  }
  const uint64_t used = block_sum<kWarps>(rows, warp_sums);
  const uint64_t step = uint64_t{r.launch.ctas} * kThreads;
  for (uint64_t i = used * r.top_k() + cta * kThreads + threadIdx.x;
       i < r.call.num_rows * r.top_k(); i += step) {
    r.call.topk_local[i] = -1;
  }
}

// What is wrong with the call; the first finding counts, and every rank comes to the same one.
__device__ void find_fault(const Router& r, const unsigned long long* arriving,
                           RouteReport* report) {
  const auto tell = [&](RouteFault fault, uint32_t rank, int64_t count) {
    if (report->fault != 0) return;  // the host has not yet seen an earlier one
    report->fault_rank = rank;
    report->fault_layout = r.header(rank, 0, RouteCounts::kLayout);
    report->fault_alignment = r.header(rank, 0, RouteCounts::kAlignment);
    report->fault_zero_copy = r.header(rank, 0, RouteCounts::kZeroCopy);
    report->fault_limit = r.header(rank, 0, RouteCounts::kMaxRows);
    report->fault_count = count;
    // Last: a host that sees it sees the rest.
    ptx::st_release_sys(&report->fault, static_cast<uint32_t>(fault));
  };
  for (uint32_t rank = 0; rank < r.num_ranks(); ++rank) {
    int64_t bad = 0;
    for (uint32_t part = 0; part < kRouteParts; ++part) {
      bad += r.header(rank, part, RouteCounts::kBadIds);
    }
    if (bad != 0) return tell(RouteFault::kBadIds, rank, bad);
  }
  // A rank with a bound and one without would part ways at an error: that is a mismatch too.
  const auto bounded = [&](uint32_t rank) { return r.header(rank, 0, RouteCounts::kMaxRows) >= 0; };
  for (uint32_t rank = 0; rank < r.num_ranks(); ++rank) {
    for (const uint32_t which :
         {RouteCounts::kLayout, RouteCounts::kAlignment, RouteCounts::kZeroCopy}) {
      if (r.header(rank, 0, which) != r.header(0, 0, which)) {
        return tell(RouteFault::kMismatch, rank == r.me ? 0 : rank, 0);
      }
    }
    if (bounded(rank) != bounded(0)) return tell(RouteFault::kMismatch, rank == r.me ? 0 : rank, 0);
  }
  for (uint32_t rank = 0; rank < r.num_ranks(); ++rank) {
    const int32_t limit = r.header(rank, 0, RouteCounts::kMaxRows);
    if (limit >= 0 && arriving[rank] > static_cast<uint32_t>(limit)) {
      return tell(RouteFault::kOverflow, rank, static_cast<int64_t>(arriving[rank]));
    }
  }
}

// 3c. Totals for the other kernels and for the host. `arriving` is [R], shared.
__device__ void summary_job(const Router& r, unsigned long long* arriving) {
  const uint32_t num_ranks = r.num_ranks();
  RouteReport* report = r.call.report;
  for (uint32_t i = threadIdx.x; i < num_ranks; i += kThreads) {
    arriving[i] = 0;
    r.call.matrix[num_ranks * num_ranks + i] = r.header(i, 0, RouteCounts::kTokens);
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < num_ranks * num_ranks; i += kThreads) {
    int32_t sum = 0;
    for (uint32_t part = 0; part < kRouteParts; ++part) {
      sum += r.sent(i / num_ranks, part, i % num_ranks);
    }
    r.call.matrix[i] = sum;
    report->matrix[i] = sum;
    if (r.call.expert_layout == 0) atomicAdd(&arriving[i % num_ranks], sum);
  }
  for (uint32_t e = threadIdx.x; e < r.num_experts(); e += kThreads) {
    const uint32_t rank = e / r.num_local();
    // Where a bound is given the host reads no counts, and the bound may cut them.
    const bool told = rank == r.me && r.call.max_rows < 0;
    if (!told && r.call.expert_layout == 0) continue;
    uint64_t total = 0;
    for (uint32_t i = 0; i < num_ranks * kRouteParts; ++i) {
      total += r.chosen(i / kRouteParts, i % kRouteParts, e);
    }
    if (told) report->counts[e % r.num_local()] = static_cast<int32_t>(total);
    if (r.call.expert_layout == 0) continue;
    total = (total + r.call.alignment - 1) / r.call.alignment * r.call.alignment;
    atomicAdd(&arriving[rank], total);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  report->num_rows = static_cast<int64_t>(arriving[r.me]);
  find_fault(r, arriving, report);
  ptx::st_release_sys(&report->ready, 1);
}

}  // namespace

__global__ void __launch_bounds__(kThreads, 1)
    route_kernel(const __grid_constant__ RouteArgs args) {
  extern __shared__ __align__(16) int32_t shared[];
  __shared__ int32_t warp_sums[kWarps];
  __shared__ int32_t token_row[kThreads];
  __shared__ unsigned long long arriving[kMaxRanks];
  const Place place = Place::here(args.launch);
  const RouteCall& call = args.calls[place.local];
  const Watchdog watchdog = make_watchdog(args.launch, place.local, call.rank);
  if (__syncthreads_or(watchdog.aborted())) return;
  const uint32_t epoch = watchdog.state->route_epoch + 1;
  const Router r{args.launch, call, call.rank, epoch % 2};
  const uint32_t num_ranks = r.num_ranks(), ctas = args.launch.ctas;

  delay(call.delay_ns);
  for (uint32_t p = place.cta; p < kRouteParts; p += ctas) push_part(r, p, shared, epoch);
  if (!wait_for_all(r, epoch, watchdog)) return;

  const ReceiveScratch scratch{shared, shared + r.num_local(), token_row, warp_sums};
  const uint32_t receives = num_ranks * kRouteParts;
  // The summary first: the host may be waiting for it.
  for (uint32_t job = place.cta; job < 1 + kRouteParts + receives; job += ctas) {
    if (job == 0) {
      summary_job(r, arriving);
    } else if (job <= kRouteParts) {
      send_job(r, job - 1, shared, shared + num_ranks, shared + 2 * num_ranks);
    } else {
      const uint32_t i = job - 1 - kRouteParts;
      receive_job(r, i / kRouteParts, i % kRouteParts, scratch);
    }
    __syncthreads();
  }
  clear_unused_ids(r, place.cta, warp_sums);
  finish_epoch(watchdog.state, &watchdog.state->route_epoch, ctas);
}

cudaError_t launch_route(const RouteArgs& args, cudaStream_t stream) {
  const auto& shape = args.launch.layout.shape;
  const uint64_t receive = (1 + kWarps) * (shape.num_experts / shape.num_ranks);
  const uint64_t send = (2 + kWarps) * shape.num_ranks;
  const uint64_t push = args.launch.layout.count_pitch;
  const uint64_t words =
      receive > send ? (receive > push ? receive : push) : (send > push ? send : push);
  const int bytes = static_cast<int>(words * sizeof(int32_t));
  const cudaError_t status =
      cudaFuncSetAttribute(route_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  route_kernel<<<args.launch.num_local * args.launch.ctas, kThreads, bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace dualpipe
