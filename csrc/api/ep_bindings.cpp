// Python's view of the expert-parallel kernels. Addresses are integers; what they point at is
// described in the headers of csrc/ep. Checks here are those that only this side can make: which
// ranks a launch may act for, and whether its warps have what they need.
#include "api/ep_bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "api/check.h"
#include "api/error_channel.h"
#include "api/handle_arrays.h"
#include "api/route_reports.h"
#include "comm/epoch.h"
#include "ep/combine.h"
#include "ep/copy_engine.h"
#include "ep/dispatch.h"
#include "ep/low_latency.h"
#include "ep/route.h"

namespace py = pybind11;

namespace dualpipe {
namespace {

using Address = uint64_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t as_stream(Address address) { return pointer<CUstream_st>(address); }

// What every launch of a buffer shares.
struct Comm {
  PeerTable peers;
  WorkspaceLayout layout;
  const ErrorChannel* channel;
  uint64_t timeout_ns;

  LaunchArgs launch(size_t num_local, uint32_t ctas) const {
    if (num_local == 0 || num_local > std::min(kMaxLocalRanks, peers.num_ranks)) {
      throw std::invalid_argument("expected from 1 to " +
                                  std::to_string(std::min(kMaxLocalRanks, peers.num_ranks)) +
                                  " ranks in a launch, got " + std::to_string(num_local));
    }
    if (ctas == 0) throw std::invalid_argument("expected at least one SM for a kernel, got 0");
    return {peers, layout, channel->records(), timeout_ns, static_cast<uint32_t>(num_local), ctas};
  }
};

Comm make_comm(const PeerTable& peers, const WorkspaceLayout& layout, const ErrorChannel& channel,
               uint64_t timeout_ns) {
  if (layout.shape.num_ranks != peers.num_ranks || layout.bytes > peers.bytes) {
    throw std::invalid_argument(
        "expected a peer table for " + std::to_string(layout.shape.num_ranks) + " ranks and " +
        std::to_string(layout.bytes) + " bytes, got one for " + std::to_string(peers.num_ranks) +
        " and " + std::to_string(peers.bytes));
  }
  return {peers, layout, &channel, timeout_ns};
}

template <class Args, class Call>
Args with_calls(const Comm& comm, const std::vector<Call>& calls, uint32_t ctas, Args args = {}) {
  args.launch = comm.launch(calls.size(), ctas);
  for (size_t i = 0; i < calls.size(); ++i) {
    if (calls[i].rank >= comm.peers.num_ranks || calls.size() > comm.channel->num_local()) {
      throw std::invalid_argument("expected calls of ranks of the buffer, got rank " +
                                  std::to_string(calls[i].rank));
    }
    args.calls[i] = calls[i];
  }
  return args;
}

Payload payload_from(const std::string& name) {
  if (name == "as_is") return Payload::kAsIs;
  if (name == "quantize") return Payload::kQuantize;
  if (name == "quantize_pow2") return Payload::kQuantizePow2;
  throw std::invalid_argument("expected a payload of as_is, quantize, quantize_pow2, got " + name);
}

// By the number of each.
constexpr const char* kRowLayouts[] = {"token", "expert", "groups"};

RowLayout row_layout_from(const std::string& name) {
  for (const RowLayout layout : {kTokenRows, kExpertRows, kExpertGroups}) {
    if (name == kRowLayouts[layout]) return layout;
  }
  throw std::invalid_argument("expected a row layout of token, expert, groups, got " + name);
}

RowType row_type_from(const std::string& name) {
  if (name == "bfloat16") return RowType::kBf16;
  if (name == "float16") return RowType::kF16;
  if (name == "float32") return RowType::kF32;
  if (name == "float64") return RowType::kF64;
  throw std::invalid_argument("expected rows of bfloat16, float16, float32, float64, got " + name);
}

// A ring of fewer than two stages would never load anything. Warps that have no ring take none.
void check_stages(const Tuning& tuning, bool sending_rings, bool receiving_rings) {
  const auto check = [](uint32_t warps, uint32_t stages, const char* role) {
    if (warps != 0 && stages < 2) {
      throw std::invalid_argument(std::string("expected two stages or more for warps that ") +
                                  role + ", got " + std::to_string(stages));
    }
  };
  if (sending_rings) check(tuning.send_warps, tuning.send_stages, "send");
  if (sending_rings) check(tuning.own_warps, tuning.own_stages, "keep rows");
  if (receiving_rings) check(tuning.receive_warps, tuning.receive_stages, "receive");
}

void route(const Comm& comm, const std::vector<RouteCall>& calls, uint32_t ctas, Address stream) {
  const auto args = with_calls<RouteArgs>(comm, calls, ctas);
  check_cuda(launch_route(args, as_stream(stream)), "route");
}

// What the launches of one kind of call have in common, on all ranks: made once, used by every
// call.
struct DispatchPlan {
  uint32_t ctas;
  DispatchArgs args;  // without the calls
};

DispatchPlan dispatch_plan(const std::string& payload, uint32_t in_bytes, uint32_t out_bytes,
                           uint32_t num_scales, uint32_t weight_bytes, const Tuning& tuning,
                           uint32_t ctas) {
  DispatchPlan plan{ctas, {}};
  plan.args.payload = payload_from(payload);
  plan.args.in_bytes = in_bytes;
  plan.args.out_bytes = out_bytes;
  plan.args.num_scales = num_scales;
  plan.args.weight_bytes = weight_bytes;
  plan.args.tuning = tuning;
  return plan;
}

void dispatch(const Comm& comm, const std::vector<DispatchCall>& calls, const DispatchPlan& plan,
              Address stream) {
  const auto args = with_calls(comm, calls, plan.ctas, plan.args);
  bool receives = false;
  for (const DispatchCall& call : calls) receives = receives || call.keep_in_slab == 0;
  check_stages(args.tuning, true, receives);
  check_cuda(launch_dispatch(args, as_stream(stream)), "dispatch");
}

struct CombinePlan {
  uint32_t ctas;
  CombineArgs args;  // without the calls
};

CombinePlan combine_plan(const std::string& row_type, bool expert_layout, bool weighted,
                         uint32_t row_bytes, uint32_t weight_bytes, const Tuning& tuning,
                         uint32_t ctas) {
  CombinePlan plan{ctas, {}};
  plan.args.type = row_type_from(row_type);
  plan.args.expert_layout = expert_layout;
  plan.args.weighted = weighted;
  plan.args.row_bytes = row_bytes;
  plan.args.weight_bytes = weight_bytes;
  plan.args.tuning = tuning;
  check_stages(tuning, !expert_layout, false);
  return plan;
}

void combine(const Comm& comm, const std::vector<CombineCall>& calls, const CombinePlan& plan,
             Address stream) {
  const auto args = with_calls(comm, calls, plan.ctas, plan.args);
  check_cuda(launch_combine(args, as_stream(stream)), "combine");
}

// --- few tokens -----------------------------------------------------------------------------

void check_inboxes(const Comm& comm) {
  const uint64_t slabs = comm.layout.shape.num_slabs;
  if (slabs < kInboxes) {
    throw std::invalid_argument("expected " + std::to_string(kInboxes) +
                                " slabs or more for low-latency calls, got " +
                                std::to_string(slabs));
  }
}

void low_latency_dispatch(const Comm& comm, const std::vector<DispatchCall>& calls,
                          const DispatchPlan& plan, Address stream) {
  const auto args = with_calls(comm, calls, plan.ctas, plan.args);
  check_inboxes(comm);
  check_cuda(launch_low_latency_dispatch(args, as_stream(stream)), "low-latency dispatch");
}

void low_latency_combine(const Comm& comm, const std::vector<CombineCall>& calls,
                         const CombinePlan& plan, Address stream) {
  const auto args = with_calls(comm, calls, plan.ctas, plan.args);
  check_inboxes(comm);
  check_cuda(launch_low_latency_combine(args, as_stream(stream)), "low-latency combine");
}

// --- copy engines ---------------------------------------------------------------------------

std::unique_ptr<CopyLanes> copy_lanes(uint32_t num_ranks) {
  auto lanes = std::make_unique<CopyLanes>();
  check_cuda(lanes->open(num_ranks), "streams for the copy engines");
  return lanes;
}

void set_repeats(CopyLanes& lanes, double repeats) {
  if (!(repeats >= 1 && repeats <= 1e6)) {
    throw std::invalid_argument("expected repeats from 1 to 1e6, got " + std::to_string(repeats));
  }
  lanes.repeats = repeats;
}

void set_detour(CopyLanes& lanes, Address address, uint64_t bytes) {
  if ((address == 0) != (bytes == 0)) {
    throw std::invalid_argument("expected host memory and its size, or 0 and 0, got an address " +
                                std::string(address == 0 ? "0" : "not 0") + " and " +
                                std::to_string(bytes) + " bytes");
  }
  lanes.detour = pointer<uint8_t>(address);
  lanes.detour_bytes = bytes;
}

CopyShape copy_shape(const std::vector<uint32_t>& ends, bool in_turn, bool together,
                     uint32_t staging_slab, const Tuning& pack, uint32_t pack_ctas,
                     const Tuning& take, uint32_t take_ctas) {
  CopyShape shape{{static_cast<uint32_t>(ends.size()), {}},
                  in_turn,
                  together,
                  staging_slab,
                  pack,
                  pack_ctas,
                  take,
                  take_ctas};
  uint32_t before = 0;
  for (size_t i = 0; i < ends.size(); ++i) {
    if (ends[i] <= before || ends[i] > kSegmentUnits) before = kSegmentUnits + 1;
    if (before > kSegmentUnits) break;
    shape.parts.ends[i] = before = ends[i];
  }
  if (before != kSegmentUnits) {
    throw std::invalid_argument("expected ascending ends of parts, the last " +
                                std::to_string(kSegmentUnits));
  }
  if (pack_ctas == 0 || take_ctas == 0) {
    throw std::invalid_argument("expected at least one SM for a kernel, got 0");
  }
  return shape;
}

// What only a wrong caller can get wrong, but would write anywhere.
void check_copies(const Comm& comm, const CopyLanes& lanes, const CopyShape& shape,
                  const std::vector<CopyCall>& copies, size_t num_calls) {
  const uint64_t ranks = comm.peers.num_ranks, tokens = comm.layout.shape.max_tokens;
  const auto fits = [&](const std::vector<uint32_t>& rows) {
    return rows.size() == ranks &&
           std::all_of(rows.begin(), rows.end(), [&](uint32_t n) { return n <= tokens; });
  };
  bool good = copies.size() == num_calls && lanes.num_lanes() == ranks &&
              shape.parts.count <= comm.layout.control.runs;
  for (const CopyCall& call : copies) good = good && fits(call.sends) && fits(call.receives);
  if (!good)
    throw std::invalid_argument("expected parts and rows that fit the communication memory");
}

// The plan is that of the kernels before the copies.
void carry_dispatch(const Comm& comm, const std::vector<DispatchCall>& calls,
                    const CopyLanes& lanes, const std::vector<CopyCall>& copies,
                    const CopyShape& shape, const DispatchPlan& plan, Address stream) {
  const auto args = with_calls(comm, calls, plan.ctas, plan.args);
  check_stages(shape.pack, true, false);
  check_stages(shape.take, false, true);
  check_copies(comm, lanes, shape, copies, calls.size());
  check_cuda(dualpipe::carry_dispatch(lanes, args, copies, shape, as_stream(stream)),
             "dispatch by copy engines");
}

void carry_combine(const Comm& comm, const std::vector<CombineCall>& calls, const CopyLanes& lanes,
                   const std::vector<CopyCall>& copies, const CopyShape& shape,
                   const CombinePlan& plan, bool direct, Address stream) {
  const auto args = with_calls(comm, calls, plan.ctas, plan.args);
  check_copies(comm, lanes, shape, copies, calls.size());
  check_cuda(dualpipe::carry_combine(lanes, args, copies, shape, direct, as_stream(stream)),
             "combine by copy engines");
}

const char* fault_name(uint32_t fault) {
  switch (static_cast<RouteFault>(fault)) {
    case RouteFault::kBadIds:
      return "bad_ids";
    case RouteFault::kMismatch:
      return "mismatch";
    case RouteFault::kOverflow:
      return "overflow";
    default:
      return "none";
  }
}

// The fault that a report tells, or None; it is cleared, unless the host will `keep` it. With
// `up_to` only one of the route with that epoch or of an earlier one, modulo 2^32; another stays.
py::object take_fault(const RouteReports& reports, uint32_t index, std::optional<uint32_t> up_to,
                      bool keep) {
  RouteReport& report = reports.at(index);
  const uint32_t fault = __atomic_load_n(&report.fault, __ATOMIC_ACQUIRE);
  if (fault == 0 || (up_to && !epoch_reached(*up_to, report.fault_epoch))) return py::none();
  py::dict fields;
  fields["fault"] = fault_name(fault);
  fields["rank"] = report.fault_rank;
  fields["layout"] = kRowLayouts[report.fault_layout];
  fields["alignment"] = report.fault_alignment;
  fields["zero_copy"] = report.fault_zero_copy != 0;
  fields["limit"] = report.fault_limit;
  fields["count"] = report.fault_count;
  if (!keep) __atomic_store_n(&report.fault, 0u, __ATOMIC_RELEASE);
  return fields;
}

void bind_reports(py::module_& m) {
  py::class_<RouteReports>(m, "RouteReports")
      .def(py::init<uint32_t>(), py::arg("count"))
      .def("expect", &RouteReports::expect, py::arg("index"))
      .def("wait", &RouteReports::wait, py::arg("index"), py::arg("channel"), py::arg("record"),
           py::arg("timeout_ns"), py::call_guard<py::gil_scoped_release>())
      .def("any_fault", &RouteReports::any_fault)
      .def("take_fault", &take_fault, py::arg("index"), py::arg("up_to") = py::none(),
           py::arg("keep") = false)
      .def(
          "num_rows", [](const RouteReports& r, uint32_t index) { return r.at(index).num_rows; },
          py::arg("index"))
      .def(
          "matrix",
          [](const RouteReports& reports, uint32_t index, uint32_t num_ranks) {
            const int32_t* numbers = reports.at(index).matrix;
            std::vector<std::vector<int32_t>> rows;
            for (uint32_t s = 0; s < num_ranks; ++s, numbers += num_ranks) {
              rows.emplace_back(numbers, numbers + num_ranks);
            }
            return rows;
          },
          py::arg("index"), py::arg("num_ranks"))
      .def(
          "counts",
          [](const RouteReports& reports, uint32_t index, uint32_t num_local_experts) {
            const int32_t* counts = reports.at(index).counts;
            return std::vector<int32_t>(counts,
                                        counts + std::min(num_local_experts, kMaxLocalExperts));
          },
          py::arg("index"), py::arg("num_local_experts"));
}

// Arguments of a call come by position: one by one by name would take as long as the launch.
void bind_calls(py::module_& m) {
  py::class_<RouteCall>(m, "RouteCall");
  py::class_<DispatchCall>(m, "DispatchCall");
  py::class_<CombineCall>(m, "CombineCall");
  py::class_<HandleArrays>(m, "HandleArrays")
      .def(py::init([](const WorkspaceLayout& layout, uint32_t rank, uint32_t num_tokens,
                       const std::string& row_layout, bool moves_parts, Address arrays,
                       Address topk_local, Address counts, Address offsets) {
             return HandleArrays(layout, rank, num_tokens, row_layout_from(row_layout), moves_parts,
                                 arrays, topk_local, counts, offsets);
           }),
           py::arg("layout"), py::arg("rank"), py::arg("num_tokens"), py::arg("row_layout"),
           py::arg("moves_parts"), py::arg("arrays"), py::arg("topk_local"), py::arg("counts"),
           py::arg("offsets"))
      .def_static(
          "bytes",
          [](const WorkspaceLayout& layout, uint32_t num_tokens, const std::string& row_layout,
             bool moves_parts) {
            return HandleArrays::bytes(layout, num_tokens, row_layout_from(row_layout),
                                       moves_parts);
          },
          py::arg("layout"), py::arg("num_tokens"), py::arg("row_layout"), py::arg("moves_parts"))
      .def("route_call", &HandleArrays::route_call, py::arg("alignment"), py::arg("max_rows"),
           py::arg("zero_copy"), py::arg("delay_ns"), py::arg("topk_idx"), py::arg("num_rows"),
           py::arg("reports"), py::arg("report"))
      .def("dispatch_call", &HandleArrays::dispatch_call, py::arg("slab"), py::arg("keep_in_slab"),
           py::arg("send_delay_ns"), py::arg("receive_delay_ns"), py::arg("x"), py::arg("x_scales"),
           py::arg("weights"), py::arg("out_rows"), py::arg("out_scales"), py::arg("out_weights"),
           py::arg("num_rows"), py::arg("out_pitch"), py::arg("out_scale_pitch"))
      .def("combine_call", &HandleArrays::combine_call, py::arg("send_delay_ns"),
           py::arg("receive_delay_ns"), py::arg("rows"), py::arg("num_rows"), py::arg("weights"),
           py::arg("bias"), py::arg("row_weights"), py::arg("y"), py::arg("token_weights"));
}

void bind_copies(py::module_& m) {
  py::class_<CopyLanes>(m, "CopyLanes")
      .def(py::init(&copy_lanes), py::arg("num_ranks"))
      .def_property(
          "repeats", [](const CopyLanes& lanes) { return lanes.repeats; }, &set_repeats)
      .def("set_detour", &set_detour, py::arg("address"), py::arg("bytes"));
  py::class_<CopyCall>(m, "CopyCall")
      .def(py::init([](std::vector<uint32_t> sends, std::vector<uint32_t> receives) {
             return CopyCall{std::move(sends), std::move(receives)};
           }),
           py::kw_only(), py::arg("sends"), py::arg("receives"));
  py::class_<CopyShape>(m, "CopyShape")
      .def(py::init(&copy_shape), py::kw_only(), py::arg("ends"), py::arg("in_turn"),
           py::arg("together"), py::arg("staging_slab"), py::arg("pack"), py::arg("pack_ctas"),
           py::arg("take"), py::arg("take_ctas"));
  m.def("carry_dispatch", &carry_dispatch, py::arg("comm"), py::arg("calls"), py::arg("lanes"),
        py::arg("copies"), py::arg("shape"), py::arg("plan"), py::arg("stream"));
  m.def("carry_combine", &carry_combine, py::arg("comm"), py::arg("calls"), py::arg("lanes"),
        py::arg("copies"), py::arg("shape"), py::arg("plan"), py::arg("direct"), py::arg("stream"));
}

void bind_plans(py::module_& m) {
  py::class_<DispatchPlan>(m, "DispatchPlan")
      .def(py::init(&dispatch_plan), py::kw_only(), py::arg("payload"), py::arg("in_bytes"),
           py::arg("out_bytes"), py::arg("num_scales"), py::arg("weight_bytes"), py::arg("tuning"),
           py::arg("ctas"));
  py::class_<CombinePlan>(m, "CombinePlan")
      .def(py::init(&combine_plan), py::kw_only(), py::arg("row_type"), py::arg("expert_layout"),
           py::arg("weighted"), py::arg("row_bytes"), py::arg("weight_bytes"), py::arg("tuning"),
           py::arg("ctas"));
}

}  // namespace

void bind_ep(py::module_& m) {
  m.attr("MAX_LOCAL_RANKS") = kMaxLocalRanks;
  m.attr("MAX_LOCAL_EXPERTS") = kMaxLocalExperts;
  m.attr("SEGMENT_UNITS") = kSegmentUnits;
  bind_reports(m);
  py::class_<Comm>(m, "Comm").def(py::init(&make_comm), py::arg("peers"), py::arg("layout"),
                                  py::arg("channel"), py::arg("timeout_ns"),
                                  py::keep_alive<1, 4>());
  py::class_<Tuning>(m, "Tuning")
      .def(py::init([](uint32_t send_ctas, uint32_t send_warps, uint32_t send_stages,
                       uint32_t own_warps, uint32_t own_stages, uint32_t receive_warps,
                       uint32_t receive_stages, uint32_t send_piece, uint32_t receive_piece,
                       bool mixed) {
             return Tuning{send_ctas,     send_warps,     send_stages, own_warps,     own_stages,
                           receive_warps, receive_stages, send_piece,  receive_piece, mixed};
           }),
           py::kw_only(), py::arg("send_ctas"), py::arg("send_warps"), py::arg("send_stages"),
           py::arg("own_warps"), py::arg("own_stages"), py::arg("receive_warps"),
           py::arg("receive_stages"), py::arg("send_piece"), py::arg("receive_piece"),
           py::arg("mixed"));
  bind_calls(m);
  bind_plans(m);
  m.def("route", &route, py::arg("comm"), py::arg("calls"), py::arg("ctas"), py::arg("stream"));
  m.def("dispatch", &dispatch, py::arg("comm"), py::arg("calls"), py::arg("plan"),
        py::arg("stream"));
  m.def("combine", &combine, py::arg("comm"), py::arg("calls"), py::arg("plan"), py::arg("stream"));
  m.def("low_latency_dispatch", &low_latency_dispatch, py::arg("comm"), py::arg("calls"),
        py::arg("plan"), py::arg("stream"));
  m.def("low_latency_combine", &low_latency_combine, py::arg("comm"), py::arg("calls"),
        py::arg("plan"), py::arg("stream"));
  bind_copies(m);
}

}  // namespace dualpipe
