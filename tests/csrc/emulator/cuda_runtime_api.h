// Stands for CUDA's header where a kernel's own source is compiled for the CPU: the language
// extensions and intrinsics that it uses, on one thread block whose threads are fibers.
//
// Threads run one at a time, each until it waits for others, and who runs next is drawn at random:
// a missing barrier shows as a wrong result under some seed. What would be undefined or hang on a
// GPU ends the program with a message: lanes of a warp at different operations, a barrier that some
// thread never reaches. What this cannot show is memory that is shared by more than one block.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __forceinline__ inline

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };

struct Index {
  uint32_t x;
};
inline Index threadIdx{}, blockIdx{}, blockDim{};

namespace emulator {

inline constexpr uint32_t kLanes = 32;
inline constexpr size_t kStackBytes = 128 * 1024;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

// A meeting of `size` threads: everyone leaves a value, waits for all, and sees all values.
struct Meeting {
  uint32_t size = 0;
  uint32_t arrived = 0;
  uint64_t round = 0;
  const char* operation = nullptr;
  std::vector<uint64_t> values, last_values;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Meeting* waits_at = nullptr;
  uint64_t waits_for_round = 0;
  bool done = false;
};

class Block {
 public:
  Block(uint32_t num_threads, uint64_t seed, std::function<void()> body)
      : body_(std::move(body)), threads_(num_threads), warps_(num_threads / kLanes), seed_(seed) {
    all_.size = num_threads;
    for (Meeting& warp : warps_) warp.size = kLanes;
    for (Meeting& warp : warps_) warp.values.resize(kLanes);
    all_.values.resize(num_threads);
  }

  void run() {
    current_ = this;
    blockDim.x = static_cast<uint32_t>(threads_.size());
    for (Thread& thread : threads_) {
      thread.stack.reset(new char[kStackBytes]);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStackBytes;
      thread.context.uc_link = &scheduler_;
      makecontext(&thread.context, &Block::enter, 0);
    }
    std::vector<uint32_t> ready;
    while (true) {
      ready.clear();
      bool all_done = true;
      for (uint32_t i = 0; i < threads_.size(); ++i) {
        const Thread& thread = threads_[i];
        all_done = all_done && thread.done;
        const bool waits = thread.waits_at && thread.waits_at->round < thread.waits_for_round;
        if (!thread.done && !waits) ready.push_back(i);
      }
      if (all_done) return;
      if (ready.empty()) fail("expected every thread to reach the same operations");
      // All that can run do, in an order of their own; drawing anew after each would be slow.
      for (size_t i = ready.size(); i > 1; --i) std::swap(ready[i - 1], ready[random() % i]);
      for (const uint32_t i : ready) {
        threadIdx.x = i;
        swapcontext(&scheduler_, &threads_[i].context);
      }
    }
  }

  static Block& current() { return *current_; }
  Meeting& all() { return all_; }
  Meeting& warp() { return warps_[threadIdx.x / kLanes]; }

  // What all threads of the meeting left, by thread.
  const std::vector<uint64_t>& meet(Meeting& meeting, const char* operation, uint64_t value) {
    if (meeting.arrived == 0) meeting.operation = operation;
    if (std::strcmp(meeting.operation, operation) != 0) fail("expected one operation, got two");
    meeting.values[threadIdx.x % meeting.size] = value;
    const uint64_t round = meeting.round + 1;
    if (++meeting.arrived == meeting.size) {
      meeting.last_values = meeting.values;
      meeting.arrived = 0;
      meeting.round = round;
    } else {
      const uint32_t self = threadIdx.x;
      threads_[self].waits_at = &meeting;
      threads_[self].waits_for_round = round;
      swapcontext(&threads_[self].context, &scheduler_);
    }
    return meeting.last_values;
  }

 private:
  static void enter() {
    current_->body_();
    current_->threads_[threadIdx.x].done = true;
  }
  uint64_t random() {
    seed_ ^= seed_ << 13;
    seed_ ^= seed_ >> 7;
    return seed_ ^= seed_ << 17;
  }

  static inline Block* current_ = nullptr;
  std::function<void()> body_;
  std::vector<Thread> threads_;
  std::vector<Meeting> warps_;
  Meeting all_;
  ucontext_t scheduler_{};
  uint64_t seed_;
};

inline const std::vector<uint64_t>& meet_warp(uint32_t mask, const char* what, uint64_t value) {
  if (mask != 0xffffffffu) fail("expected all lanes");
  return Block::current().meet(Block::current().warp(), what, value);
}

}  // namespace emulator

inline void __syncthreads() {
  emulator::Block::current().meet(emulator::Block::current().all(), "syncthreads", 0);
}
inline int __syncthreads_or(int value) {
  uint64_t any = 0;
  emulator::Block& block = emulator::Block::current();
  for (const uint64_t v : block.meet(block.all(), "syncthreads_or", value != 0)) any |= v;
  return any != 0;
}
inline uint64_t __shfl_xor_sync(uint32_t mask, uint64_t value, uint32_t lanes) {
  const auto& values = emulator::meet_warp(mask, "shfl_xor", value);
  return values[(threadIdx.x % emulator::kLanes) ^ lanes];
}
inline uint32_t __reduce_min_sync(uint32_t mask, uint32_t value) {
  uint64_t least = value;
  for (const uint64_t v : emulator::meet_warp(mask, "reduce_min", value)) {
    least = v < least ? v : least;
  }
  return static_cast<uint32_t>(least);
}
inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value) {
  uint64_t most = value;
  for (const uint64_t v : emulator::meet_warp(mask, "reduce_max", value))
    most = v > most ? v : most;
  return static_cast<uint32_t>(most);
}
inline uint32_t __ballot_sync(uint32_t mask, bool value) {
  uint32_t bits = 0, lane = 0;
  for (const uint64_t v : emulator::meet_warp(mask, "ballot", value))
    bits |= (v ? 1u : 0u) << lane++;
  return bits;
}
inline int __ffs(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)); }

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }
inline uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }
// Threads run one at a time.
inline uint32_t atomicMax(uint32_t* address, uint32_t value) {
  const uint32_t old = *address;
  *address = max(old, value);
  return old;
}
