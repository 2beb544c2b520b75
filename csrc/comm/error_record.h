// What a kernel tells the host when it gives up.
#pragma once

#include <cstdint>

namespace dualpipe {

enum class ErrorCode : uint32_t {
  kNone = 0,
  kTimeout = 1,
  kMismatch = 2,  // a peer sends other messages than this rank takes
};

// Where in a protocol a rank was waiting.
enum class Phase : uint32_t {
  kBarrier = 1,
  kRoute = 2,           // for the expert ids of a peer
  kDispatchPermit = 3,  // for leave to write into a peer's slab
  kDispatchRows = 4,    // for rows of a peer
  kCombinePermit = 5,
  kCombineRows = 6,
  kSendRoom = 7,       // of a stage-to-stage send: for the receiver to have read what lies there
  kSendPiece = 8,      // for a piece of it
  kDispatchHello = 9,  // low latency: for a peer to be in the call
  kCombineHello = 10,
};

constexpr const char* phase_name(Phase phase) {
  switch (phase) {
    case Phase::kBarrier:
      return "barrier";
    case Phase::kRoute:
      return "route";
    case Phase::kDispatchPermit:
      return "dispatch (permission)";
    case Phase::kDispatchRows:
      return "dispatch (rows)";
    case Phase::kCombinePermit:
      return "combine (permission)";
    case Phase::kCombineRows:
      return "combine (rows)";
    case Phase::kSendRoom:
      return "send (room)";
    case Phase::kSendPiece:
      return "send (piece)";
    case Phase::kDispatchHello:
      return "dispatch (hello)";
    case Phase::kCombineHello:
      return "combine (hello)";
  }
  return "unknown";
}

// One per rank, in host-mapped memory; written at most once, by the first thread of the rank that
// fails. `code` is stored last with release semantics: a host that sees it sees the rest.
struct ErrorRecord {
  uint32_t code;      // ErrorCode
  uint32_t phase;     // Phase
  uint32_t rank;      // that gave up
  uint32_t peer;      // it was waiting for
  uint32_t chunk;     // of the transfer; 0 where the phase has none
  uint32_t expected;  // value of the flag it needed; kMismatch: its own message, see hello()
  uint32_t seen;      // value it last read; the peer's message
  uint32_t epoch;     // of the call
};

static_assert(sizeof(ErrorRecord) == 32, "the host reads these bytes as they are");

}  // namespace dualpipe
