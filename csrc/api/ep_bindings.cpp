// Python's view of the expert-parallel kernels. Addresses are integers; what they point at is
// described in the headers of csrc/ep. Checks here are those that only this side can make: which
// ranks a launch may act for, and whether its warps have what they need.
#include "api/ep_bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "api/check.h"
#include "api/error_channel.h"
#include "api/handle_arrays.h"
#include "api/route_reports.h"
#include "ep/combine.h"
#include "ep/copy_engine.h"
#include "ep/dispatch.h"
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

RowType row_type_from(const std::string& name) {
  if (name == "bfloat16") return RowType::kBf16;
  if (name == "float16") return RowType::kF16;
  if (name == "float32") return RowType::kF32;
  if (name == "float64") return RowType::kF64;
  throw std::invalid_argument("expected rows of bfloat16, float16, float32, float64, got " + name);
}

enum class DispatchPart { kAll, kPack, kOwn, kUnpack };

DispatchPart dispatch_part_from(const std::string& name) {
  if (name == "all") return DispatchPart::kAll;
  if (name == "pack") return DispatchPart::kPack;
  if (name == "own") return DispatchPart::kOwn;
  if (name == "unpack") return DispatchPart::kUnpack;
  throw std::invalid_argument("expected a part of all, pack, own, unpack, got " + name);
}

enum class CombinePart { kAll, kPack, kReduce };

CombinePart combine_part_from(const std::string& name) {
  if (name == "all") return CombinePart::kAll;
  if (name == "pack") return CombinePart::kPack;
  if (name == "reduce") return CombinePart::kReduce;
  throw std::invalid_argument("expected a part of all, pack, reduce, got " + name);
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
  DispatchPart part;
  uint32_t staging_slab;
  uint32_t ctas;
  DispatchArgs args;  // without the calls
};

DispatchPlan dispatch_plan(const std::string& part, const std::string& payload, uint32_t in_bytes,
                           uint32_t out_bytes, uint32_t num_scales, uint32_t weight_bytes,
                           const Tuning& tuning, uint32_t staging_slab, uint32_t ctas) {
  DispatchPlan plan{dispatch_part_from(part), staging_slab, ctas, {}};
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
  auto args = with_calls(comm, calls, plan.ctas, plan.args);
  bool receives = false;
  for (const DispatchCall& call : calls) receives = receives || call.keep_in_slab == 0;
  check_stages(plan.args.tuning, true, receives);
  const cudaStream_t on = as_stream(stream);
  switch (plan.part) {
    case DispatchPart::kPack:
      return check_cuda(launch_dispatch_pack(args, plan.staging_slab, on), "dispatch (pack)");
    case DispatchPart::kOwn:
      return check_cuda(launch_dispatch_own(args, on), "dispatch (own rows)");
    case DispatchPart::kUnpack:
      return check_cuda(launch_dispatch_unpack(args, on), "dispatch (unpack)");
    case DispatchPart::kAll:
      return check_cuda(launch_dispatch(args, on), "dispatch");
  }
}

struct CombinePlan {
  CombinePart part;
  uint32_t staging_slab;
  uint32_t ctas;
  CombineArgs args;  // without the calls
};

CombinePlan combine_plan(const std::string& part, const std::string& row_type, bool expert_layout,
                         bool weighted, uint32_t row_bytes, uint32_t weight_bytes,
                         const Tuning& tuning, uint32_t staging_slab, uint32_t ctas) {
  CombinePlan plan{combine_part_from(part), staging_slab, ctas, {}};
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
  const cudaStream_t on = as_stream(stream);
  switch (plan.part) {
    case CombinePart::kPack:
      return check_cuda(launch_combine_pack(args, plan.staging_slab, on), "combine (pack)");
    case CombinePart::kReduce:
      return check_cuda(launch_combine_reduce(args, on), "combine (reduce)");
    case CombinePart::kAll:
      return check_cuda(launch_combine(args, on), "combine");
  }
}

void arrivals(const Comm& comm, const std::vector<ArrivalsCall>& calls, bool combine,
              Address stream) {
  auto args = with_calls<ArrivalsArgs>(comm, calls, 1);
  args.combine = combine;
  check_cuda(launch_arrivals(args, as_stream(stream)), "arrivals");
}

// `rows` runs of `bytes`, `from_pitch` and `to_pitch` apart.
void copy(Address to, uint64_t to_pitch, Address from, uint64_t from_pitch, uint64_t bytes,
          uint64_t rows, Address stream) {
  if (bytes == 0 || rows == 0) return;
  const bool whole = bytes == to_pitch && bytes == from_pitch;
  check_cuda(whole ? cudaMemcpyAsync(pointer<void>(to), pointer<void>(from), bytes * rows,
                                     cudaMemcpyDeviceToDevice, as_stream(stream))
                   : cudaMemcpy2DAsync(pointer<void>(to), to_pitch, pointer<void>(from), from_pitch,
                                       bytes, rows, cudaMemcpyDeviceToDevice, as_stream(stream)),
             "copy to a peer");
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

// The fault that a report tells, or None; it is cleared.
py::object take_fault(const RouteReports& reports, uint32_t index) {
  RouteReport& report = reports.at(index);
  const uint32_t fault = __atomic_load_n(&report.fault, __ATOMIC_ACQUIRE);
  if (fault == 0) return py::none();
  py::dict fields;
  fields["fault"] = fault_name(fault);
  fields["rank"] = report.fault_rank;
  fields["layout"] = report.fault_layout;
  fields["alignment"] = report.fault_alignment;
  fields["zero_copy"] = report.fault_zero_copy != 0;
  fields["limit"] = report.fault_limit;
  fields["count"] = report.fault_count;
  __atomic_store_n(&report.fault, 0u, __ATOMIC_RELEASE);
  return fields;
}

void bind_reports(py::module_& m) {
  py::class_<RouteReports>(m, "RouteReports")
      .def(py::init<uint32_t>(), py::arg("count"))
      .def("expect", &RouteReports::expect, py::arg("index"))
      .def("wait", &RouteReports::wait, py::arg("index"), py::arg("channel"), py::arg("record"),
           py::arg("timeout_ns"), py::call_guard<py::gil_scoped_release>())
      .def("any_fault", &RouteReports::any_fault)
      .def("take_fault", &take_fault, py::arg("index"))
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
          py::arg("index"), py::arg("num_ranks"));
}

// Arguments of a call come by position: one by one by name would take as long as the launch.
void bind_calls(py::module_& m) {
  py::class_<RouteCall>(m, "RouteCall");
  py::class_<DispatchCall>(m, "DispatchCall");
  py::class_<CombineCall>(m, "CombineCall");
  py::class_<HandleArrays>(m, "HandleArrays")
      .def(py::init<const WorkspaceLayout&, uint32_t, uint32_t, bool, Address, Address, Address,
                    Address>(),
           py::arg("layout"), py::arg("rank"), py::arg("num_tokens"), py::arg("expert_layout"),
           py::arg("arrays"), py::arg("topk_local"), py::arg("counts"), py::arg("offsets"))
      .def_static("bytes", &HandleArrays::bytes, py::arg("layout"), py::arg("num_tokens"),
                  py::arg("expert_layout"))
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

void bind_plans(py::module_& m) {
  py::class_<DispatchPlan>(m, "DispatchPlan")
      .def(py::init(&dispatch_plan), py::kw_only(), py::arg("part"), py::arg("payload"),
           py::arg("in_bytes"), py::arg("out_bytes"), py::arg("num_scales"),
           py::arg("weight_bytes"), py::arg("tuning"), py::arg("staging_slab"), py::arg("ctas"));
  py::class_<CombinePlan>(m, "CombinePlan")
      .def(py::init(&combine_plan), py::kw_only(), py::arg("part"), py::arg("row_type"),
           py::arg("expert_layout"), py::arg("weighted"), py::arg("row_bytes"),
           py::arg("weight_bytes"), py::arg("tuning"), py::arg("staging_slab"), py::arg("ctas"));
}

}  // namespace

void bind_ep(py::module_& m) {
  m.attr("MAX_LOCAL_RANKS") = kMaxLocalRanks;
  m.attr("COPY_EPOCH_OFFSET") = offsetof(ControlState, copy_epoch);
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
  py::class_<ArrivalsCall>(m, "ArrivalsCall")
      .def(py::init([](uint32_t rank) { return ArrivalsCall{rank}; }), py::kw_only(),
           py::arg("rank"));
  m.def("route", &route, py::arg("comm"), py::arg("calls"), py::arg("ctas"), py::arg("stream"));
  m.def("dispatch", &dispatch, py::arg("comm"), py::arg("calls"), py::arg("plan"),
        py::arg("stream"));
  m.def("combine", &combine, py::arg("comm"), py::arg("calls"), py::arg("plan"), py::arg("stream"));
  m.def("arrivals", &arrivals, py::arg("comm"), py::arg("calls"), py::kw_only(), py::arg("combine"),
        py::arg("stream"));
  m.def("copy", &copy, py::kw_only(), py::arg("to"), py::arg("to_pitch"), py::arg("source"),
        py::arg("source_pitch"), py::arg("bytes"), py::arg("rows"), py::arg("stream"));
}

}  // namespace dualpipe
