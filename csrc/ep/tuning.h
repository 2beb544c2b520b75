// How a kernel's CTAs and their warps are divided among the roles. Measured, see docs/LOG.md;
// results do not depend on it.
#pragma once

#include <cstdint>

#include "layout/carver.h"

namespace dualpipe {

// An SM's stores move at most 50 GB/s beside its loads (43 to a peer), and stores that wait for the
// link hold up all that come behind them. So whole CTAs send, and others do what stays on the GPU.
// Where SMs are few, or rows are quantised, which should happen once, all CTAs do all (`mixed`).
struct Tuning {
  uint32_t send_ctas;       // of each rank; the others are local CTAs
  uint32_t send_warps;      // of a sending CTA
  uint32_t send_stages;     // pieces in flight of each of them
  uint32_t own_warps;       // of a local CTA: rows that stay on the rank
  uint32_t own_stages;      //
  uint32_t receive_warps;   // of a local CTA: rows of other ranks, or sums
  uint32_t receive_stages;  //
  uint32_t send_piece;      // bytes of a row in a stage, at most; a multiple of 1024
  uint32_t receive_piece;   //
  uint32_t mixed;  // 1: send warps serve this rank too, and every CTA is a sending and a local one

  DUALPIPE_HD constexpr uint32_t threads() const {
    const uint32_t local_warps = own_warps + receive_warps;
    if (mixed != 0) return 32 * (send_warps + receive_warps);
    return 32 * (send_warps > local_warps ? send_warps : local_warps);
  }
};

}  // namespace dualpipe
