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
#include "comm/chained_launch.cuh"
#include "comm/launch.cuh"
#include "ep/route.h"
#include "ep/route_jobs.cuh"
#include "ptx/grid.cuh"
#include "ptx/memory.cuh"

namespace dualpipe {
namespace {

constexpr uint32_t kThreads = kRouteThreads, kWarps = kRouteWarps;

// 1. Sends part `part` of this rank's ids to every rank. `numbers` is [count_pitch], shared.
__device__ void push_part(const Router& r, uint32_t part, int32_t* numbers, uint32_t epoch) {
  const auto& layout = r.launch.layout;
  const uint32_t num_ranks = r.num_ranks(), top_k = r.top_k();
  const uint32_t pitch = static_cast<uint32_t>(layout.count_pitch);
  for (uint32_t i = threadIdx.x; i < pitch; i += kThreads) numbers[i] = 0;
  __syncthreads();

  const uint32_t size = part_tokens(r.call.num_tokens, r.parts());
  const uint32_t end = min((part + 1) * size, r.call.num_tokens);
  for (uint32_t t = part * size + threadIdx.x; t < end; t += kThreads) {
    uint64_t goes_to = 0;
    uint32_t bad = 0;
    for (uint32_t k0 = 0; k0 < r.id_pitch(); k0 += 8) {
      // All asked for before any is looked at; and no branches, so that eight take as long as one.
      int64_t ids[8];
#pragma unroll
      for (uint32_t j = 0; j < 8; ++j) {
        ids[j] = k0 + j < top_k ? r.call.topk_idx[uint64_t{t} * top_k + k0 + j] : -1;
      }
      alignas(16) int16_t packed[8];
#pragma unroll
      for (uint32_t j = 0; j < 8; ++j) {
        const bool good = static_cast<uint64_t>(ids[j]) < r.num_experts();
        const uint32_t id = good ? static_cast<uint32_t>(ids[j]) : 0;
        bad += !good && ids[j] != -1 ? 1 : 0;
        packed[j] = good ? static_cast<int16_t>(id) : -1;
        goes_to |= uint64_t{good} << r.owner(id);
        if (good) atomicAdd(&numbers[RouteCounts::kHeader + num_ranks + id], 1);
      }
      const uint64_t at = uint64_t{t} * r.id_pitch() + k0;
      const uint4 all = *reinterpret_cast<const uint4*>(packed);
      *reinterpret_cast<uint4*>(r.call.ids + at) = all;
      for (uint32_t to = 0; to < num_ranks; ++to) {
        *reinterpret_cast<uint4*>(r.ids(to, r.me) + at) = all;
      }
    }
    if (bad != 0) atomicAdd(&numbers[RouteCounts::kBadIds], bad);
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
    r.counts(i / pitch, r.index(r.me, part))[i % pitch] = numbers[i % pitch];
  }
  __syncthreads();
  for (uint32_t to = threadIdx.x; to < num_ranks; to += kThreads) {
    uint32_t* flags = layout.control.route_flags.in(r.launch.peers.base[to]);
    ptx::st_release_sys(&flags[r.index(r.me, part)], epoch);
  }
}

// 2. All threads alike: false if the rank has failed.
__device__ bool wait_for_all(const Router& r, uint32_t epoch, const Watchdog& watchdog) {
  const uint32_t* flags = r.launch.layout.control.route_flags.in(r.launch.peers.base[r.me]);
  bool arrived = true;
  for (uint32_t i = threadIdx.x; i < r.all_parts(); i += kThreads) {
    const uint32_t source = i / r.parts();
    const WaitSite site{Phase::kRoute, r.me, source, i % r.parts(), epoch};
    arrived = arrived && wait_epoch(&flags[i], epoch, site, watchdog);
  }
  return __syncthreads_and(arrived);
}

// Rows of the output that no token fills have no experts.
__device__ void clear_unused_ids(const Router& r, uint32_t cta, int32_t* warp_sums) {
  if (r.call.topk_local == nullptr) return;
  int32_t rows = 0;
  for (uint32_t i = threadIdx.x; i < r.all_parts(); i += kThreads) {
    rows += r.sent(i, r.me);
  }
  const uint64_t used = block_sum<kWarps>(rows, warp_sums);
  const uint64_t step = uint64_t{r.launch.ctas} * kThreads;
  for (uint64_t i = used * r.top_k() + cta * kThreads + threadIdx.x;
       i < r.call.num_rows * r.top_k(); i += step) {
    r.call.topk_local[i] = -1;
  }
}

// What is wrong with the call; the first finding counts, and every rank comes to the same one. Of
// settings that differ a rank is told of the first other than its own.
__device__ void find_fault(const Router& r, uint32_t epoch, const unsigned long long* arriving,
                           RouteReport* report) {
  const auto tell = [&](RouteFault fault, uint32_t rank, int64_t count) {
    if (report->fault != 0) return;  // the host has not yet seen an earlier one
    report->fault_rank = rank;
    report->fault_epoch = epoch;
    report->fault_layout = r.setting(rank, RouteCounts::kLayout);
    report->fault_alignment = r.setting(rank, RouteCounts::kAlignment);
    report->fault_zero_copy = r.setting(rank, RouteCounts::kZeroCopy);
    report->fault_limit = r.setting(rank, RouteCounts::kMaxRows);
    report->fault_count = count;
    // Last: a host that sees it sees the rest.
    ptx::st_release_sys(&report->fault, static_cast<uint32_t>(fault));
  };
  for (uint32_t rank = 0; rank < r.num_ranks(); ++rank) {
    int64_t bad = 0;
    for (uint32_t part = 0; part < r.parts(); ++part) {
      bad += r.header(r.index(rank, part), RouteCounts::kBadIds);
    }
    if (bad != 0) return tell(RouteFault::kBadIds, rank, bad);
  }
  // A rank with a bound and one without would part ways at an error: that is a mismatch too.
  const auto bounded = [&](uint32_t rank) { return r.setting(rank, RouteCounts::kMaxRows) >= 0; };
  for (uint32_t rank = 0; rank < r.num_ranks(); ++rank) {
    for (const uint32_t which :
         {RouteCounts::kLayout, RouteCounts::kAlignment, RouteCounts::kZeroCopy}) {
      if (r.setting(rank, which) != r.setting(r.me, which)) {
        return tell(RouteFault::kMismatch, rank, 0);
      }
    }
    if (bounded(rank) != bounded(r.me)) return tell(RouteFault::kMismatch, rank, 0);
  }
  for (uint32_t rank = 0; rank < r.num_ranks(); ++rank) {
    const int32_t limit = r.setting(rank, RouteCounts::kMaxRows);
    if (limit >= 0 && arriving[rank] > static_cast<uint32_t>(limit)) {
      return tell(RouteFault::kOverflow, rank, static_cast<int64_t>(arriving[rank]));
    }
  }
}

// 3c. Totals for the other kernels, and what is wrong with the call; for a host that waits, all
// that it needs. `arriving` is [R], `totals` [E]; both shared.
__device__ void summary_job(const Router& r, uint32_t epoch, unsigned long long* arriving,
                            uint32_t* totals) {
  const uint32_t num_ranks = r.num_ranks(), num_local = r.num_local;
  const bool host_waits = r.call.max_rows < 0;
  RouteReport* report = r.call.report;
  for (uint32_t i = threadIdx.x; i < num_ranks; i += kThreads) {
    r.call.matrix[num_ranks * num_ranks + i] = r.setting(i, RouteCounts::kTokens);
  }
  for (uint32_t i = threadIdx.x; i < num_ranks * num_ranks; i += kThreads) {
    int32_t sum = 0;
    for (uint32_t part = 0; part < r.parts(); ++part) {
      sum += r.sent(r.index(i / num_ranks, part), i % num_ranks);
    }
    r.call.matrix[i] = sum;
    if (host_waits) report->matrix[i] = sum;
  }
  const bool expert_layout = r.call.expert_layout != 0;
  for (uint32_t e = threadIdx.x; e < r.num_experts(); e += kThreads) {
    const bool own = r.owner(e) == r.me;
    if (!own && !expert_layout) continue;
    uint32_t total = 0;
    for (uint32_t i = 0; i < r.all_parts(); ++i) total += r.chosen(i, e);
    const uint32_t local = e - r.me * num_local;
    if (own && host_waits) report->counts[local] = static_cast<int32_t>(total);
    // In expert layout the room for rows may cut them, see expert_starts.
    if (own && !expert_layout) r.call.counts[local] = total;
    totals[e] = r.fixed_groups() ? total : r.group_rows(total);
  }
  __syncthreads();
  // What there has to be room for: the rows of a rank, or those of its fullest group of fixed size.
  // A warp for each rank: no atomics, which all threads would queue up for.
  const uint32_t lane = threadIdx.x % 32;
  const auto both = [&](unsigned long long a, unsigned long long b) {
    return r.fixed_groups() ? max(a, b) : a + b;
  };
  for (uint32_t rank = threadIdx.x / 32; rank < num_ranks; rank += kWarps) {
    unsigned long long rows = 0;
    const uint32_t count = expert_layout ? num_local : r.all_parts();
    for (uint32_t i = lane; i < count; i += 32) {
      rows = both(rows, expert_layout ? totals[rank * num_local + i] : r.sent(i, rank));
    }
    for (uint32_t step = 16; step != 0; step /= 2) {
      rows = both(rows, __shfl_xor_sync(~0u, rows, step));
    }
    if (lane == 0) arriving[rank] = rows;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  find_fault(r, epoch, arriving, report);
  if (!host_waits) return;
  report->num_rows = static_cast<int64_t>(arriving[r.me]);
  ptx::st_release_sys(&report->ready, 1);
}

}  // namespace

__global__ void __launch_bounds__(kThreads, 1)
    route_kernel(const __grid_constant__ RouteArgs args) {
  extern __shared__ __align__(16) int32_t shared[];
  __shared__ int32_t warp_sums[kWarps];
  __shared__ int32_t token_row[kThreads];
  __shared__ unsigned long long arriving[kMaxRanks];
  ptx::griddepcontrol_wait();
  const Place place = Place::here(args.launch);
  const RouteCall& call = args.calls[place.local];
  const Watchdog watchdog = make_watchdog(args.launch, place.local, call.rank);
  if (__syncthreads_or(watchdog.aborted())) return;
  const uint32_t epoch = watchdog.state->route_epoch + 1;
  const Router r(args.launch, call, epoch);
  const uint32_t num_ranks = r.num_ranks(), ctas = args.launch.ctas;

  delay(call.delay_ns);
  for (uint32_t p = place.cta; p < r.parts(); p += ctas) push_part(r, p, shared, epoch);
  if (!wait_for_all(r, epoch, watchdog)) return;
  ptx::griddepcontrol_launch_dependents();

  const ReceiveScratch scratch{shared, shared + r.num_local, token_row, warp_sums};
  const uint32_t receives = r.all_parts();
  // The summary first: the host may be waiting for it.
  for (uint32_t job = place.cta; job < 1 + r.parts() + receives; job += ctas) {
    if (job == 0) {
      summary_job(r, epoch, arriving, reinterpret_cast<uint32_t*>(shared));
    } else if (job <= r.parts()) {
      send_job(r, job - 1, shared, shared + num_ranks, shared + 2 * num_ranks);
    } else {
      const uint32_t i = job - 1 - r.parts();
      receive_job(r, i / r.parts(), i % r.parts(), scratch);
    }
    __syncthreads();
  }
  clear_unused_ids(r, place.cta, warp_sums);
  finish_epoch(watchdog.state, &watchdog.state->route_epoch, ctas);
}

cudaError_t launch_route(const RouteArgs& given, cudaStream_t stream) {
  RouteArgs args = given;
  const auto& shape = args.launch.layout.shape;
  // A CTA for every job; more would only wait.
  const uint32_t jobs = 1 + args.launch.layout.parts * (1 + args.launch.peers.num_ranks);
  if (args.launch.ctas > jobs) args.launch.ctas = jobs;
  const uint64_t receive = (1 + kWarps) * (shape.num_experts / shape.num_ranks);
  const uint64_t send = (2 + kWarps) * shape.num_ranks;
  const uint64_t push = args.launch.layout.count_pitch;
  const uint64_t words =
      receive > send ? (receive > push ? receive : push) : (send > push ? send : push);
  const int bytes = static_cast<int>(words * sizeof(int32_t));
  const cudaError_t status =
      cudaFuncSetAttribute(route_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  return launch_chained(route_kernel, args.launch.num_local * args.launch.ctas, kThreads, bytes,
                        stream, args);
}

}  // namespace dualpipe
