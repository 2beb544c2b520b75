// How a CTA is divided among its roles. Measured, see docs/LOG.md; results do not depend on it.
#pragma once

#include <cstdint>

namespace dualpipe {

struct Tuning {
  uint32_t send_warps;
  uint32_t send_stages;  // rows in flight of each sending warp
  uint32_t receive_warps;
  uint32_t receive_stages;
  uint32_t receive_piece;  // bytes of a row that a receiving stage holds, at most
  uint32_t send_piece;     // bytes of a row that a sending stage holds, at most; a multiple of 1024
};

// Largest piece of a row that is moved at once; longer rows are cut.
inline constexpr uint32_t kMaxPieceBytes = 16384;

}  // namespace dualpipe
