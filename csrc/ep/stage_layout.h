// How large a stage of a warp's ring is; see ring.cuh.
#pragma once

#include <cstdint>

#include "layout/carver.h"

namespace dualpipe {

// A stage holds a piece of a row, and behind it numbers that belong to the row.
struct StageLayout {
  uint32_t piece_bytes;  // at most
  uint32_t extra_bytes;  // at most

  DUALPIPE_HD constexpr uint32_t extra_offset() const { return (piece_bytes + 127) / 128 * 128; }
  DUALPIPE_HD constexpr uint32_t bytes() const {
    return extra_offset() + (extra_bytes + 127) / 128 * 128;
  }
};

}  // namespace dualpipe
