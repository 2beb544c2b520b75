// layout/carver.h: alignment, order, and sizes that do not fit.
#include <cstdint>

#include "check.h"
#include "layout/carver.h"

using dualpipe::Carver;
using dualpipe::kMaxBytes;
using dualpipe::kRegionAlignment;
using dualpipe::Region;

namespace {

// The same code runs at compile time, as in kernels that carve by themselves.
constexpr uint64_t end_of_two_regions() {
  Carver carver;
  carver.take<float>(3);
  return carver.take<uint8_t>(1).offset + carver.bytes();
}
static_assert(end_of_two_regions() == 128 + 256);

void regions_follow_each_other_on_aligned_offsets() {
  Carver carver;
  const Region<uint8_t> a = carver.take<uint8_t>(129);
  const Region<int32_t> b = carver.take<int32_t>(2, 3, 4);
  const Region<double> c = carver.take<double>(1);
  CHECK(a.offset == 0 && a.bytes() == 129);
  CHECK(b.offset == 256 && b.count == 24 && b.bytes() == 96);
  CHECK(c.offset == 384);
  CHECK(carver.bytes() == 512 && carver.bytes() % kRegionAlignment == 0);
}

void empty_regions_take_no_room() {
  Carver carver;
  carver.take<uint8_t>(5);
  CHECK(carver.take<float>(0).bytes() == 0);
  CHECK(carver.take<float>(UINT64_MAX, 0).bytes() == 0 && !carver.overflowed());
  CHECK(carver.take<uint8_t>(1).offset == 128);
}

void a_region_finds_its_place_in_an_allocation() {
  alignas(128) uint8_t memory[512] = {};
  Carver carver;
  carver.take<uint8_t>(1);
  const Region<uint32_t> words = carver.take<uint32_t>(4);
  words.in(memory)[2] = 7;
  CHECK(memory[128 + 2 * 4] == 7);
}

void overflow_is_remembered_not_wrapped() {
  // 2^32 * 2^32 is 0 modulo 2^64.
  Carver product;
  CHECK(product.take<uint8_t>(uint64_t{1} << 32, uint64_t{1} << 32).bytes() == 0);
  CHECK(product.overflowed());
  CHECK(product.take<uint8_t>(1).bytes() == 0 && product.overflowed());

  Carver third_factor;
  third_factor.take<uint8_t>(uint64_t{1} << 31, uint64_t{1} << 31, 4);
  CHECK(third_factor.overflowed());

  Carver element;
  element.take<double>(uint64_t{1} << 60);
  CHECK(element.overflowed());

  Carver sum;
  sum.take<uint8_t>(kMaxBytes / 2);
  CHECK(!sum.overflowed());
  sum.take<uint8_t>(kMaxBytes / 2);
  CHECK(sum.overflowed());
}

}  // namespace

int main() {
  regions_follow_each_other_on_aligned_offsets();
  empty_regions_take_no_room();
  a_region_finds_its_place_in_an_allocation();
  overflow_is_remembered_not_wrapped();
}
