// What the CUDA driver says of this machine.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dualpipe {

struct DeviceInfo {
  int index;
  std::string name;
  std::string pci_bus_id;
  int capability_major;
  int capability_minor;
  int num_sms;
  uint64_t memory_bytes;
  uint64_t shared_memory_bytes;  // the most that one block can ask for
  uint64_t l2_bytes;
};

// One direction: `device` accessing the memory of `peer`.
struct PeerLink {
  bool access;           // loads, stores and copies are possible
  bool native_atomics;   // remote atomics run in hardware: NVLink has them, PCIe does not
  int performance_rank;  // as CUDA ranks it; 0 is the fastest link of the machine
};

// The newest CUDA version the driver supports (13000 for 13.0), or 0 without a driver.
int driver_version();
// The CUDA version this module was built with.
int runtime_version();
// Empty without a driver or without a GPU.
std::vector<DeviceInfo> devices();
PeerLink peer_link(int device, int peer);
// Which capture a stream is in; 0 for none.
uint64_t capture_id(uint64_t stream);
// A stream of the current device that shares its place with no other: torch hands out its own from
// a pool, so that two of them can be the same. Of the highest priority.
uint64_t create_stream();

// Copies bytes from address to address on a stream, by a copy engine if another GPU has one of
// them.
void copy(uint64_t to, uint64_t from, uint64_t bytes, uint64_t stream);

void destroy_stream(uint64_t stream);
// Lets kernels on `device` address the memory of `peer`; allowed twice.
void enable_peer_access(int device, int peer);

}  // namespace dualpipe
