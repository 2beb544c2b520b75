// What a kernel tells the host when it gives up.
#pragma once

#include <cstdint>

namespace dualpipe {

enum class ErrorCode : uint32_t { kNone = 0, kTimeout = 1 };

// Where in a protocol a rank was waiting.
enum class Phase : uint32_t { kBarrier = 1 };

constexpr const char* phase_name(Phase phase) {
  switch (phase) {
    case Phase::kBarrier:
      return "barrier";
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
  uint32_t expected;  // value of the flag it needed
  uint32_t seen;      // value it last read
  uint32_t epoch;     // of the call
};

static_assert(sizeof(ErrorRecord) == 32, "the host reads these bytes as they are");

}  // namespace dualpipe
