// What a permit says of its call, so that ranks which make different calls learn of it: which call
// it is, and what a message of it is.
//
//   bits 0 to 15   units of 16 bytes of a row
//   bit 16         scales come with it
//   bits 17, 18    words of a choice's number; 0: there are none
//   bit 19         of a combine, not of a dispatch
//   bits 20, 21    RowType of a combine; a dispatch only moves bytes
//   bits 24 to 31  of the epoch
#pragma once

#include <cstdint>

#include "ep/combine.h"
#include "ep/dispatch.h"

namespace dualpipe {

__device__ __forceinline__ uint32_t hello(const DispatchArgs& args, uint32_t epoch) {
  return epoch << 24 | args.weight_bytes / 4 << 17 | uint32_t{args.num_scales != 0} << 16 |
         (args.out_bytes / 16 & 0xffff);
}

__device__ __forceinline__ uint32_t hello(const CombineArgs& args, uint32_t epoch) {
  return epoch << 24 | static_cast<uint32_t>(args.type) << 20 | 1u << 19 |
         args.weight_bytes / 4 << 17 | (args.row_bytes / 16 & 0xffff);
}

__device__ __forceinline__ bool is_of_same_epoch(uint32_t a, uint32_t b) {
  return a >> 24 == b >> 24;
}

// What a hello says without its epoch, for the host.
__device__ __forceinline__ uint32_t said(uint32_t hello) { return hello & 0xffffff; }

}  // namespace dualpipe
