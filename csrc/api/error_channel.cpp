#include "api/error_channel.h"

#include <cuda_runtime_api.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "api/check.h"

namespace dualpipe {

ErrorChannel::ErrorChannel(uint32_t num_local) : num_local_(num_local) {
  // Mapped and portable: with unified addressing every GPU uses the host's address as it is.
  void* memory = nullptr;
  check_cuda(cudaHostAlloc(&memory, num_local * sizeof(ErrorRecord),
                           cudaHostAllocMapped | cudaHostAllocPortable),
             "cudaHostAlloc");
  records_ = static_cast<ErrorRecord*>(memory);
  clear();
}

ErrorChannel::~ErrorChannel() {
  // Fails when the process is already ending and the driver is gone; there is nothing left to free.
  (void)cudaFreeHost(records_);
}

std::optional<ErrorRecord> ErrorChannel::read(uint32_t index) const {
  if (index >= num_local_) {
    throw std::invalid_argument("expected a local rank below " + std::to_string(num_local_) +
                                ", got " + std::to_string(index));
  }
  // Pairs with the release store of the code: the other fields were written before it.
  const uint32_t code = __atomic_load_n(&records_[index].code, __ATOMIC_ACQUIRE);
  if (code == static_cast<uint32_t>(ErrorCode::kNone)) return std::nullopt;
  return records_[index];
}

void ErrorChannel::clear() { std::memset(records_, 0, num_local_ * sizeof(ErrorRecord)); }

}  // namespace dualpipe
