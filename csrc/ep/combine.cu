// Combine: a token's rows come back to its rank and are summed, in a fixed order.
//
//   sending CTA    send warps    token layout:  row -> stage ------>  slab of the token's rank
//                                expert layout: sum of rows ------->
//   local CTA      sum warps     slab + own rows [+ bias] -> y
//
// The rows of one source rank are consecutive in token layout and stay so in its slab: segment s of
// the slab holds, in order, what rank s sends. Each CTA has both kinds of warps: sending is bound
// by the link, reducing by memory.
//
// Protocol and ordering are those of dispatch.cu, with chunks of a few rows in the place of runs:
// permit -> rows -> flag of the chunk -> reduction of the tokens whose rows it holds. Own rows need
// no flag: kernels before this one on the stream wrote them.
//
// Order of a sum: on the rank of the experts by top-k place, rounded once; at the token's rank by
// rank, in float32 (float64 for float64), the bias last, rounded once.
#include "ep/combine.h"

#include "ep/combine_sum.cuh"

namespace dualpipe {
namespace {

// Threads of a CTA, at most; what the registers of the sums leave room for.
template <bool kExpert>
constexpr uint32_t kCombineThreads = kExpert ? 512 : 640;

// How a CTA's shared memory is cut, the same on host and device: stages of the send warps, their
// barriers, then every warp's list of sources.
struct SharedLayout {
  StageLayout stage;
  uint32_t piece;    // bytes
  uint32_t stages;   // of all warps
  uint32_t sources;  // bytes of a warp's list

  __host__ __device__ explicit SharedLayout(const CombineArgs& args) {
    const auto& shape = args.launch.layout.shape;
    piece = args.row_bytes < args.tuning.send_piece ? args.row_bytes : args.tuning.send_piece;
    stage = {piece, CombineNumbers::kWeights + round_up(shape.top_k * args.weight_bytes, 16)};
    stages = args.tuning.send_warps * args.tuning.send_stages;
    sources = static_cast<uint32_t>((shape.num_ranks + shape.top_k) * sizeof(SumSource<F64Row>));
  }

  __host__ __device__ uint32_t full_offset() const { return stages * stage.bytes(); }
  __host__ __device__ uint32_t sources_offset() const {
    return full_offset() + 8 * round_up(stages, 2);
  }
  __host__ __device__ uint32_t first_rows_offset(const CombineArgs& args) const {
    return sources_offset() + args.tuning.threads() / 32 * sources;
  }
  __host__ __device__ uint32_t bytes(const CombineArgs& args) const {
    return first_rows_offset(args) + 4 * static_cast<uint32_t>(args.launch.layout.shape.num_ranks);
  }
};

template <class Row, bool kExpert, bool kWeighted, bool kStaging>
__device__ void send_role(const Combine& c, const SharedLayout& shared, uint8_t* memory,
                          SumSource<Row>* sources, uint32_t warp, uint32_t cta, uint32_t ctas,
                          const StagedPart& staged) {
  const Tuning& tuning = c.args.tuning;
  const WorkQueue queue(c.watchdog.state, Queue::kSend, warp * ctas + cta,
                        tuning.send_warps * ctas);
  delay(c.call.send_delay_ns);
  if constexpr (kExpert) {
    send_sums<Row, kWeighted, kStaging>(c, queue, staged, sources);
  } else {
    const uint32_t stage = warp * tuning.send_stages;
    Ring ring(memory + stage * shared.stage.bytes(),
              reinterpret_cast<uint64_t*>(memory + shared.full_offset()) + stage, shared.stage,
              tuning.send_stages);
    ring.init();
    CopyChunks<kStaging> work(c, shared.piece, queue, staged);
    pump(ring, work);
  }
}

// What a kernel does of a combine: all; the way into the staging slab; or the sums. The latter two
// for one part of all segments.
enum class Half { kBoth, kPack, kReduce };

template <class Row, bool kExpert, bool kWeighted, Half kHalf>
__global__ void __launch_bounds__(kCombineThreads<kExpert>, 1)
    combine_kernel(const __grid_constant__ CombineArgs args,
                   const __grid_constant__ StagedPart staged) {
  extern __shared__ __align__(128) uint8_t memory[];
  const Place place = Place::here(args.launch);
  const CombineCall& call = args.calls[place.local];
  const Watchdog watchdog = make_watchdog(args.launch, place.local, call.rank, call.matrix);
  if (__syncthreads_or(watchdog.aborted())) return;
  const SharedLayout shared(args);
  int32_t* first_rows = reinterpret_cast<int32_t*>(memory + shared.first_rows_offset(args));
  const Combine c{{args, call, watchdog, watchdog.state->transfer_epoch + 1}, first_rows};
  const Tuning& t = args.tuning;
  const uint32_t warp = threadIdx.x / 32, cta = place.cta;
  constexpr bool kStaging = kHalf != Half::kBoth;
  // Whether this is the first kernel of the combine; and the last.
  const bool begins = kHalf != Half::kReduce && staged.part.begins();
  const bool ends = kHalf != Half::kPack && staged.part.ends();

  if (begins && !staged.together && cta == 0 && warp + 1 == blockDim.x / 32) c.send_permits(0);
  for (uint32_t r = threadIdx.x; r < c.num_ranks(); r += blockDim.x) {
    first_rows[r] = c.first_row(c.me(), r);
  }
  __syncthreads();
  auto* sources =
      reinterpret_cast<SumSource<Row>*>(memory + shared.sources_offset() + warp * shared.sources);
  const uint32_t ctas = args.launch.ctas;
  const bool sends =
      kHalf != Half::kReduce && (t.mixed != 0 || cta < t.send_ctas) && warp < t.send_warps;
  if (sends) {
    send_role<Row, kExpert, kWeighted, kStaging>(c, shared, memory, sources, warp, cta,
                                                 t.mixed != 0 ? ctas : t.send_ctas, staged);
    // As in dispatch.cu. Before the sums: of a rank that makes another call no rows may come.
    if (kHalf == Half::kBoth && cta == 0 && warp == 0) c.await_all(Phase::kCombinePermit);
  }
  // Sums start behind the send warps of a CTA that does both, else at the first warp of a local
  // one.
  const uint32_t first_sum = t.mixed != 0 ? t.send_warps : 0;
  const uint32_t first_cta = t.mixed != 0 ? 0 : t.send_ctas;
  const bool sums = cta >= first_cta && warp >= first_sum && warp < first_sum + t.receive_warps;
  if (kHalf != Half::kPack && (sends || sums)) {
    delay(call.receive_delay_ns);
    const uint32_t sum_ctas = ctas - first_cta, sum_warps = t.receive_warps * sum_ctas;
    // Who has sent everything helps with the sums that are left.
    TokenSums<Row, kExpert, kWeighted, kStaging>(c, sources)
        .run(sends ? WorkQueue::joined(c.watchdog.state, Queue::kReceive, sum_warps)
                   : WorkQueue(c.watchdog.state, Queue::kReceive,
                               (warp - first_sum) * sum_ctas + cta - first_cta, sum_warps),
             staged.part);
  }
  // The copies that follow on the stream write into the peers' slabs.
  if (kHalf == Half::kPack && begins && cta == 0 && warp == 0) {
    if (staged.together) c.send_permits(0);
    c.open_copies(Phase::kCombinePermit);
  }
  finish_epoch(watchdog.state, ends ? &watchdog.state->transfer_epoch : nullptr, args.launch.ctas);
}

template <class Row, Half kHalf>
cudaError_t launch(const CombineArgs& args, const StagedPart& staged, cudaStream_t stream) {
  const auto kernel = args.expert_layout == 0 ? combine_kernel<Row, false, false, kHalf>
                      : args.weighted == 0    ? combine_kernel<Row, true, false, kHalf>
                                              : combine_kernel<Row, true, true, kHalf>;
  return launch_transfer(kernel, args, staged, SharedLayout(args).bytes(args), stream);
}

template <Half kHalf>
cudaError_t launch_for_type(const CombineArgs& args, const StagedPart& staged,
                            cudaStream_t stream) {
  switch (args.type) {
    case RowType::kF16:
      return launch<F16Row, kHalf>(args, staged, stream);
    case RowType::kF32:
      return launch<F32Row, kHalf>(args, staged, stream);
    case RowType::kF64:
      return launch<F64Row, kHalf>(args, staged, stream);
    default:
      return launch<Bf16Row, kHalf>(args, staged, stream);
  }
}

}  // namespace

cudaError_t launch_combine(const CombineArgs& args, cudaStream_t stream) {
  return launch_for_type<Half::kBoth>(args, {0, SegmentPart::whole()}, stream);
}

cudaError_t launch_combine_pack(const CombineArgs& args, const StagedPart& staged,
                                cudaStream_t stream) {
  return launch_for_type<Half::kPack>(args, staged, stream);
}

cudaError_t launch_combine_reduce(const CombineArgs& args, const SegmentPart& part,
                                  cudaStream_t stream) {
  return launch_for_type<Half::kReduce>(args, {0, part}, stream);
}

}  // namespace dualpipe
