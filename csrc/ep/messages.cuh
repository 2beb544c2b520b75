// Rows that tell of their own arrival: no flag follows them.
//
// Every bit of an empty inbox is set. A sender stores words of 4 or 8 bytes, each at once; a
// receiver looks at a word until it has another value, and empties it. A word of a row that has all
// bits set, which is NaN in every type that rows have, is sent as NaN of the other sign.
//
// Words are relaxed accesses at system scope: each is seen whole, and none says anything of
// another. What orders the emptying of a word and its next use is said in low_latency_dispatch.cu.
#pragma once

#include <cstdint>

#include "comm/wait.cuh"
#include "ptx/memory.cuh"

namespace dualpipe {

// Of uint32_t or uint64_t.
template <class Word>
inline constexpr Word kEmpty = ~Word{0};

template <class Word>
__device__ __forceinline__ Word sealed(Word word) {
  return word == kEmpty<Word> ? kEmpty<Word> >> 1 : word;
}

template <class Word>
__device__ __forceinline__ void send_word(Word* to, Word word) {
  ptx::st_relaxed_sys(to, sealed(word));
}

// 16 bytes of a row are two words, on either side: as wide as the widest number of a row.
__device__ __forceinline__ ulonglong2 as_words(const uint4& unit) {
  return {unit.x | uint64_t{unit.y} << 32, unit.z | uint64_t{unit.w} << 32};
}

__device__ __forceinline__ uint4 as_unit(const ulonglong2& v) {
  return {uint32_t(v.x), uint32_t(v.x >> 32), uint32_t(v.y), uint32_t(v.y >> 32)};
}

__device__ __forceinline__ void send_unit(uint8_t* to, const uint4& unit) {
  const ulonglong2 v = as_words(unit);
  ptx::st_relaxed_sys_v2(to, {sealed(uint64_t{v.x}), sealed(uint64_t{v.y})});
}

__device__ __forceinline__ bool has_come(const uint4& unit) {
  return (unit.x & unit.y) != kEmpty<uint32_t> && (unit.z & unit.w) != kEmpty<uint32_t>;
}

// Units of 16 bytes of a row that one lane has to do with: number `first`, `first + 32`, ...
struct LaneUnits {
  uint32_t first;
  uint32_t end;  // of the row

  __device__ uint32_t at(uint32_t j) const { return first + 32 * j; }
  __device__ bool has(uint32_t j) const { return at(j) < end; }
};

// Waits for the lane's units of those rows that are not null, and empties them; units of the others
// keep their values. Called by a whole warp; false, for all lanes, if the rank has failed.
// `site(i)` tells what was waited for, if it was row i.
template <uint32_t kRows, uint32_t kUnits, class Site>
__device__ __forceinline__ bool take_units(uint8_t* const (&rows)[kRows], const LaneUnits& lane,
                                           uint4 (&units)[kRows][kUnits], const Watchdog& watchdog,
                                           Site site) {
  const auto each = [&](auto visit) {
#pragma unroll
    for (uint32_t i = 0; i < kRows; ++i) {
#pragma unroll
      for (uint32_t j = 0; j < kUnits; ++j) {
        if (rows[i] != nullptr && lane.has(j)) visit(i, rows[i] + 16 * lane.at(j), units[i][j]);
      }
    }
  };
  each([](uint32_t, uint8_t* at, uint4& unit) { unit = as_unit(ptx::ld_relaxed_sys_v2(at)); });
  bool come = true;
  for (uint32_t polls = 1;; ++polls) {
    uint32_t missing = 0;
    each([&](uint32_t i, uint8_t*, const uint4& unit) { missing |= has_come(unit) ? 0 : 1u << i; });
    if (missing == 0) break;
    if (polls % kPollsPerCheck == 0 && watchdog.gives_up(site(__ffs(missing) - 1), 1, 0)) {
      come = false;
      break;
    }
    each([](uint32_t, uint8_t* at, uint4& unit) {
      if (!has_come(unit)) unit = as_unit(ptx::ld_relaxed_sys_v2(at));
    });
  }
  if (__all_sync(~0u, come) == 0) return false;
  each([](uint32_t, uint8_t* at, uint4&) {
    ptx::st_relaxed_sys_v2(at, {kEmpty<uint64_t>, kEmpty<uint64_t>});
  });
  return true;
}

// The same for a word.
template <class Word, class Site>
__device__ __forceinline__ bool take_word(Word* at, Word* word, const Watchdog& watchdog,
                                          Site site) {
  *word = 0;
  bool come = true;
  for (uint32_t polls = 1; at != nullptr; ++polls) {
    *word = ptx::ld_relaxed_sys(at);
    if (*word != kEmpty<Word>) break;
    if (polls % kPollsPerCheck == 0 && watchdog.gives_up(site(), 1, 0)) {
      come = false;
      break;
    }
  }
  if (__all_sync(~0u, come) == 0) return false;
  if (at != nullptr) ptx::st_relaxed_sys(at, kEmpty<Word>);
  return true;
}

}  // namespace dualpipe
