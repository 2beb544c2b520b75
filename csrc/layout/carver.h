// Cutting one allocation into aligned, typed regions. Host and device run the same code, so both
// sides agree on every offset by construction.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DUALPIPE_HD __host__ __device__
#else
#define DUALPIPE_HD
#endif

namespace dualpipe {

// Bytes. Every region starts on a multiple of it: bulk copies of rows that do not lose 10 to 20% of
// the link, and no two regions share a cache line.
inline constexpr uint64_t kRegionAlignment = 128;

// Sizes cross into Python and torch as signed 64-bit integers.
inline constexpr uint64_t kMaxBytes = static_cast<uint64_t>(INT64_MAX);

// `count` elements of T, `offset` bytes behind the start of the allocation.
template <class T>
struct Region {
  uint64_t offset = 0;
  uint64_t count = 0;

  DUALPIPE_HD constexpr uint64_t bytes() const { return count * sizeof(T); }
  DUALPIPE_HD T* in(void* base) const {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(base) + offset);
  }
};

// Hands out regions one after the other. A size that does not fit 63 bits is remembered
// (`overflowed`), never wrapped: from then on every region is empty.
class Carver {
 public:
  // Factors are given one by one so that their product is checked here.
  template <class T>
  DUALPIPE_HD constexpr Region<T> take(uint64_t count, uint64_t factor = 1, uint64_t factor2 = 1) {
    const uint64_t total = product(product(count, factor), factor2);
    const uint64_t bytes = product(total, sizeof(T));
    if (overflowed_ || bytes > kMaxBytes - kRegionAlignment - end_) overflowed_ = true;
    if (overflowed_) return {};
    const Region<T> region{end_, total};
    end_ = align_up(end_ + bytes);
    return region;
  }

  DUALPIPE_HD constexpr uint64_t bytes() const { return end_; }
  DUALPIPE_HD constexpr bool overflowed() const { return overflowed_; }

  // The caller makes sure that `bytes` is at most kMaxBytes.
  DUALPIPE_HD static constexpr uint64_t align_up(uint64_t bytes) {
    return (bytes + kRegionAlignment - 1) / kRegionAlignment * kRegionAlignment;
  }

 private:
  DUALPIPE_HD constexpr uint64_t product(uint64_t a, uint64_t b) {
    // Half the range is left free, so that the sums above cannot wrap either.
    if (b != 0 && a > (kMaxBytes - kRegionAlignment) / b) overflowed_ = true;
    return overflowed_ ? 0 : a * b;
  }

  uint64_t end_ = 0;
  bool overflowed_ = false;
};

}  // namespace dualpipe
