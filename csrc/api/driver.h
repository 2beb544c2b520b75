// The few driver functions that the runtime does not offer. They are looked up when first used, not
// linked: the module imports on machines that have no driver.
#pragma once

#include <cstdint>

namespace dualpipe {

// The allocation that a device address lies in.
struct AddressRange {
  uint64_t start;
  uint64_t bytes;
};

// Throws std::invalid_argument if the address is not in the memory of a GPU.
AddressRange address_range(uint64_t address);

}  // namespace dualpipe
