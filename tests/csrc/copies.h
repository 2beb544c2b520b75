// ep/copy_engine.cpp without a GPU: streams are lists of operations that run in any order that
// events allow, and kernels are replaced by the least that they do. Included by one test each.
#pragma once

#include "ep/copy_engine.cpp"

#include <memory>

#include "check.h"

using namespace dualpipe;

namespace {

// Of a row, and of the numbers beside it.
constexpr uint32_t kRowBytes = 16, kStaging = 1;
constexpr SegmentParts kParts[] = {
    {1, {8}}, {2, {4, 8}}, {3, {2, 5, 8}}, {8, {1, 2, 3, 4, 5, 6, 7, 8}}};
std::mt19937 random_numbers(1);

uint32_t draw(uint32_t below) { return random_numbers() % below; }

uint32_t word(const uint8_t* bytes) {
  uint32_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word;
}

// What kernels know, as Transfer does.
template <class Call>
struct Rank {
  const LaunchArgs& launch;
  const Call& call;

  uint32_t me() const { return call.rank; }
  uint32_t ranks() const { return launch.peers.num_ranks; }
  uint32_t most() const { return static_cast<uint32_t>(launch.layout.shape.max_tokens); }
  uint32_t sent(uint32_t from, uint32_t to) const { return call.matrix[from * ranks() + to]; }
  uint32_t first_row(uint32_t from, uint32_t to) const {
    uint32_t row = 0;
    for (uint32_t s = 0; s < from; ++s) row += sent(s, to);
    return row;
  }
  uint8_t* slab_row(uint32_t slab, uint32_t segment, uint32_t row) const {
    uint8_t* base = launch.peers.base[me()] + launch.layout.slab_offset(slab);
    return launch.layout.slab.rows.in(base) + (segment * most() + row) * kRegionAlignment;
  }
  uint8_t* slab_numbers(uint32_t slab, uint32_t segment, uint32_t row) const {
    uint8_t* base = launch.peers.base[me()] + launch.layout.slab_offset(slab);
    return launch.layout.slab.weights.in(base) + (segment * most() + row) * kRowBytes;
  }
  uint32_t token(uint32_t unit, uint32_t to) const {
    return unit_token(unit, most(), sent(me(), to), call.unit_tokens + to, ranks(),
                      call.num_tokens);
  }
  uint32_t tokens_for_units(uint32_t unit) const {
    uint32_t end = unit == kSegmentUnits ? call.num_tokens : 0;
    for (uint32_t to = 0; unit % kSegmentUnits != 0 && to < ranks(); ++to) {
      if (to != me() && sent(me(), to) != 0) end = std::max(end, token(unit, to));
    }
    return end;
  }
  uint32_t tokens_of_units(uint32_t unit) const {
    uint32_t end = unit == 0 ? 0 : call.num_tokens;
    for (uint32_t to = 0; to < ranks(); ++to) {
      if (to != me()) end = std::min(end, token(unit, to));
    }
    return end;
  }

  ControlState& state() const { return *launch.layout.control.state.in(launch.peers.base[me()]); }
  uint32_t epoch() const { return state().transfer_epoch + 1; }
  PermitLine& permit(uint32_t at, uint32_t from) const {
    return launch.layout.control.permits.in(launch.peers.base[at])[from];
  }
  bool send_permits() const {
    for (uint32_t to = 0; to < ranks(); ++to) permit(to, me()).epoch = epoch();
    return true;
  }
  bool open_copies() const {
    for (uint32_t from = 0; from < ranks(); ++from) {
      if (permit(me(), from).epoch != epoch()) return false;
    }
    for (uint32_t& copied : state().copy_epochs) copied = epoch();
    return true;
  }
};

// Enqueues `act` for every rank of a launch.
template <class Args, class Act>
void for_ranks(const Args& args, cudaStream_t stream, Act act) {
  const auto kept = std::make_shared<Args>(args);
  for (uint32_t i = 0; i < args.launch.num_local; ++i) {
    using Call = std::decay_t<decltype(args.calls[0])>;
    enqueue(stream, [=] { return act(Rank<Call>{kept->launch, kept->calls[i]}); });
  }
}

template <class Args, class Act>
cudaError_t pack(const Args& args, const StagedPart& staged, cudaStream_t stream, Act act) {
  const bool begins = staged.part.begins();
  const auto send = [](const auto& r) { return r.send_permits(); };
  if (begins && !staged.together) for_ranks(args, stream, send);
  for_ranks(args, stream, act);
  if (begins && staged.together) for_ranks(args, stream, send);
  if (begins) for_ranks(args, stream, [](const auto& r) { return r.open_copies(); });
  return cudaSuccess;
}

}  // namespace

namespace dualpipe {

cudaError_t launch_dispatch_pack(const DispatchArgs& args, const StagedPart& staged,
                                 cudaStream_t stream) {
  const SegmentPart part = staged.part;
  return pack(args, staged, stream, [=](const auto& r) {
    const uint32_t end = r.tokens_for_units(part.last);
    for (uint32_t t = r.tokens_for_units(part.first); t < end; ++t) {
      for (uint32_t to = 0; to < r.ranks(); ++to) {
        const int32_t row = r.call.slots[t * r.ranks() + to];
        if (row < 0) continue;
        const bool stays = to == r.me();
        const uint32_t i = row - r.first_row(r.me(), to);
        std::memcpy(stays ? r.call.out_rows + row * kRowBytes : r.slab_row(kStaging, to, i),
                    r.call.x + t * kRowBytes, kRowBytes);
        std::memcpy(stays ? r.call.out_weights + row * kRowBytes : r.slab_numbers(kStaging, to, i),
                    r.call.weights + t * kRowBytes, kRowBytes);
      }
    }
    return true;
  });
}

cudaError_t launch_dispatch_unpack(const DispatchArgs& args, const SegmentPart& part,
                                   cudaStream_t stream) {
  for_ranks(args, stream, [=](const auto& r) {
    for (uint32_t s = 0; s < r.ranks(); ++s) {
      const uint32_t rows = s == r.me() ? 0 : r.sent(s, r.me());
      for (uint32_t i = part.first_row(r.most(), rows); i < part.last_row(r.most(), rows); ++i) {
        const uint32_t to = (r.first_row(s, r.me()) + i) * kRowBytes;
        std::memcpy(r.call.out_rows + to, r.slab_row(0, s, i), kRowBytes);
        std::memcpy(r.call.out_weights + to, r.slab_numbers(0, s, i), kRowBytes);
      }
    }
    if (part.ends()) ++r.state().transfer_epoch;
    return true;
  });
  return cudaSuccess;
}

cudaError_t launch_combine_pack(const CombineArgs& args, const StagedPart& staged,
                                cudaStream_t stream) {
  const SegmentPart part = staged.part;
  const bool sends = args.tuning.send_warps != 0;
  return pack(args, staged, stream, [=](const auto& r) {
    for (uint32_t s = 0; s < r.ranks(); ++s) {
      const uint32_t rows = s == r.me() || !sends ? 0 : r.sent(s, r.me());
      for (uint32_t i = part.first_row(r.most(), rows); i < part.last_row(r.most(), rows); ++i) {
        const uint32_t from = (r.first_row(s, r.me()) + i) * kRowBytes;
        std::memcpy(r.slab_row(kStaging, s, i), r.call.rows + from, kRowBytes);
        std::memcpy(r.slab_numbers(kStaging, s, i), r.call.row_weights + from, kRowBytes);
      }
    }
    return true;
  });
}

cudaError_t launch_combine_reduce(const CombineArgs& args, const SegmentPart& part,
                                  cudaStream_t stream) {
  for_ranks(args, stream, [=](const auto& r) {
    for (uint32_t t = r.tokens_of_units(part.first); t < r.tokens_of_units(part.last); ++t) {
      uint32_t sum = 0, numbers = 0;
      for (uint32_t from = 0; from < r.ranks(); ++from) {
        const int32_t slot = r.call.slots[t * r.ranks() + from];
        if (slot < 0) continue;
        const bool own = from == r.me();
        const uint32_t i = slot - r.first_row(r.me(), from);
        sum += word(own ? r.call.rows + slot * kRowBytes : r.slab_row(0, from, i));
        numbers += word(own ? r.call.row_weights + slot * kRowBytes : r.slab_numbers(0, from, i));
      }
      std::memcpy(r.call.y + t * kRowBytes, &sum, sizeof sum);
      std::memcpy(r.call.token_weights + t * kRowBytes, &numbers, sizeof numbers);
    }
    if (part.ends()) ++r.state().transfer_epoch;
    return true;
  });
  return cudaSuccess;
}

cudaError_t launch_arrivals(const ArrivalsArgs& args, cudaStream_t stream) {
  const uint32_t part = args.part;
  const auto kept = std::make_shared<ArrivalsArgs>(args);
  for (uint32_t i = 0; i < args.launch.num_local; ++i) {
    enqueue(stream, [=] {
      const LaunchArgs& launch = kept->launch;
      const uint32_t me = kept->calls[i].rank;
      const ControlLayout& control = launch.layout.control;
      const uint32_t epoch = control.state.in(launch.peers.base[me])->transfer_epoch + 1;
      const uint32_t* flags = control.run_flags.in(launch.peers.base[me]) + part;
      for (uint32_t s = 0; s < launch.peers.num_ranks; ++s) {
        if (s != me && flags[s * control.runs] != epoch) return false;
      }
      return true;
    });
  }
  return cudaSuccess;
}

}  // namespace dualpipe

namespace {

// A row is four words, of which the first tells which it is.
using Words = std::vector<uint32_t>;

// A dispatch and a combine of all ranks, and what must come of them.
struct Round {
  uint32_t ranks, most;
  bool known, direct;  // the host knows the numbers; rows are copied from where they are
  bool in_turn;        // rows go on one stream
  bool together;       // nobody copies before all have packed
  SegmentParts parts;
  std::vector<int32_t> matrix;
  std::vector<std::vector<int32_t>> slots, unit_tokens;
  // Rows, and the numbers beside each.
  struct Rows {
    std::vector<Words> x, out, want, rows, y, want_y;
  } rows, numbers;

  Round(uint32_t ranks, uint32_t most)
      : ranks(ranks),
        most(most),
        known(draw(2) != 0),
        direct(known && draw(2) != 0),
        in_turn(draw(2) != 0),
        together(draw(2) != 0),
        parts(kParts[draw(4)]),
        matrix(ranks * ranks),
        slots(ranks),
        unit_tokens(ranks, std::vector<int32_t>(kSegmentUnits * ranks, -1)) {
    const uint32_t density = draw(9);
    for (uint32_t r = 0; r < ranks; ++r) {
      const uint32_t tokens = draw(most + 1);
      for (uint32_t t = 0; t < tokens; ++t) {
        for (uint32_t to = 0; to < ranks; ++to) {
          const bool goes = draw(8) + to < density;
          const uint32_t i = matrix[r * ranks + to];
          slots[r].push_back(goes ? static_cast<int32_t>(i) : -1);
          if (!goes) continue;
          if (i % unit_rows(most) == 0) unit_tokens[r][i / unit_rows(most) * ranks + to] = t;
          ++matrix[r * ranks + to];
        }
      }
    }
    for (uint32_t to = 0; to < ranks; ++to) {
      uint32_t row = 0;
      for (uint32_t r = 0; r < ranks; ++r) {
        for (size_t i = to; i < slots[r].size(); i += ranks)
          slots[r][i] += slots[r][i] < 0 ? 0 : row;
        row += matrix[r * ranks + to];
      }
    }
    draw_rows(rows);
    draw_rows(numbers);
  }

  void draw_rows(Rows& of) {
    for (uint32_t r = 0; r < ranks; ++r) {
      uint32_t received = 0;
      for (uint32_t s = 0; s < ranks; ++s) received += matrix[s * ranks + r];
      of.x.push_back(drawn(slots[r].size() / ranks));
      of.y.push_back(drawn(slots[r].size() / ranks));
      of.out.push_back(drawn(received));
      of.rows.push_back(drawn(received));
    }
    of.want = of.out;
    of.want_y = of.y;
    for (uint32_t r = 0; r < ranks; ++r) {
      for (size_t t = 0; t < slots[r].size() / ranks; ++t) {
        of.want_y[r][4 * t] = 0;
        for (uint32_t to = 0; to < ranks; ++to) {
          const int32_t slot = slots[r][t * ranks + to];
          if (slot < 0) continue;
          std::copy_n(&of.x[r][4 * t], 4, &of.want[to][4 * slot]);
          of.want_y[r][4 * t] += of.rows[to][4 * slot];
        }
      }
    }
  }

  static Words drawn(uint32_t rows) {
    Words words(4 * rows + 4);
    for (uint32_t& word : words) word = draw(1 << 20);
    return words;
  }
  static uint8_t* bytes(Words& words) { return reinterpret_cast<uint8_t*>(words.data()); }

  template <class Call>
  void fill(Call& call, uint32_t rank) {
    call.rank = rank;
    call.num_tokens = slots[rank].size() / ranks;
    call.slots = slots[rank].data();
    call.matrix = matrix.data();
    call.unit_tokens = unit_tokens[rank].data();
  }
  CopyCall copies(uint32_t rank, bool back) const {
    CopyCall call;
    for (uint32_t p = 0; p < ranks; ++p) {
      const uint32_t to = known ? matrix[rank * ranks + p] : most;
      const uint32_t from = known ? matrix[p * ranks + rank] : most;
      call.sends.push_back(back ? from : to);
      call.receives.push_back(back ? to : from);
    }
    return call;
  }

  // Enqueues both for the ranks of one launch.
  void enqueue_for(const LaunchArgs& launch, uint32_t first, const CopyLanes& lanes,
                   cudaStream_t stream) {
    DispatchArgs there{};
    CombineArgs back{};
    there.launch = back.launch = launch;
    there.in_bytes = there.out_bytes = back.row_bytes = kRowBytes;
    std::vector<CopyCall> sends, returns;
    for (uint32_t i = 0; i < launch.num_local; ++i) {
      fill(there.calls[i], first + i);
      there.calls[i].x = bytes(rows.x[first + i]);
      there.calls[i].weights = bytes(numbers.x[first + i]);
      there.calls[i].out_rows = bytes(rows.out[first + i]);
      there.calls[i].out_weights = bytes(numbers.out[first + i]);
      fill(back.calls[i], first + i);
      back.calls[i].rows = bytes(rows.rows[first + i]);
      back.calls[i].row_weights = bytes(numbers.rows[first + i]);
      back.calls[i].y = bytes(rows.y[first + i]);
      back.calls[i].token_weights = bytes(numbers.y[first + i]);
      sends.push_back(copies(first + i, false));
      returns.push_back(copies(first + i, true));
    }
    CopyShape shape{};
    shape.parts = parts;
    shape.in_turn = in_turn;
    shape.together = together;
    shape.staging_slab = kStaging;
    shape.pack_ctas = shape.take_ctas = 1;
    shape.pack.send_warps = 1;
    CHECK(carry_dispatch(lanes, there, sends, shape, stream) == cudaSuccess);
    if (direct) shape.pack.send_warps = 0;
    CHECK(carry_combine(lanes, back, returns, shape, direct, stream) == cudaSuccess);
  }
};

// Ranks in one memory, and what each launch enqueues on.
struct Group {
  struct alignas(kRegionAlignment) Line {
    uint8_t bytes[kRegionAlignment];
  };
  uint32_t ranks, launches;
  WorkspaceLayout layout;
  std::vector<std::vector<Line>> memory;
  PeerTable peers;
  std::vector<CopyLanes> lanes;
  std::vector<CUstream_st> streams;

  // Virtual ranks of one launch, or processes with one each.
  Group(uint32_t ranks, uint32_t launches, uint32_t most)
      : ranks(ranks),
        launches(launches),
        layout(make_workspace_layout({ranks, ranks, 4, most, kRowBytes, 0, 4, 2})),
        memory(ranks, std::vector<Line>(layout.bytes / sizeof(Line) + 1)),
        lanes(launches),
        streams(launches) {
    peers.num_ranks = ranks;
    peers.bytes = layout.bytes;
    for (uint32_t r = 0; r < ranks; ++r) {
      peers.base[r] = reinterpret_cast<uint8_t*>(memory[r].data());
    }
    for (CopyLanes& each : lanes) CHECK(each.open(ranks) == cudaSuccess);
  }

  void enqueue(Round& round) {
    for (uint32_t i = 0; i < launches; ++i) {
      round.enqueue_for({peers, layout, nullptr, 0, ranks / launches, 1}, i, lanes[i], &streams[i]);
    }
  }
  // False if something waits for ever; without what launches before `first` have on their streams.
  bool run(uint32_t first = 0) {
    std::vector<cudaStream_t> all;
    for (uint32_t i = 0; i < launches; ++i) {
      if (i >= first) all.push_back(&streams[i]);
      all.push_back(lanes[i].turns());
      for (uint32_t peer = 0; peer < ranks; ++peer) all.push_back(lanes[i].lane(peer));
    }
    return run_streams(all, random_numbers);
  }
  uint32_t rank_of(const void* address) const {
    uint32_t rank = 0;
    const auto* byte = static_cast<const uint8_t*>(address);
    while (byte < peers.base[rank] || byte >= peers.base[rank] + layout.bytes) ++rank;
    return rank;
  }
};

}  // namespace
