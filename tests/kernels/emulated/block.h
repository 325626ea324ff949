// A thread block on the CPU, for kernel bodies written against csrc/include/mminfer/block.h: every phase loops over the
// threads. Registers start as NaN, and a use of shared memory that no barrier orders is recorded as a fault.
#pragma once

#include <cstring>
#include <vector>

#include "mminfer/block.h"

namespace mminfer {

constexpr int EMULATED_THREADS = 128;
constexpr int WARP = 32;

class EmulatedBlock {
 public:
  template <class T>
  class PerThread {
   public:
    PerThread() : values_(EMULATED_THREADS * sizeof(T), static_cast<char>(0xff)) {}
    T& operator[](int thread) { return reinterpret_cast<T*>(values_.data())[thread]; }

   private:
    std::vector<char> values_;  // bytes, so that no constructor clears them
  };

  EmulatedBlock(const i64* place, int shared_floats)
      : place_{place[0], place[1], place[2]}, shared_(shared_floats), uses_(shared_floats) {}

  i64 x() const { return place_[0]; }
  i64 y() const { return place_[1]; }
  i64 z() const { return place_[2]; }
  const char* fault() const { return fault_; }

  template <class Phase>
  void each(Phase phase) {
    for (int thread = 0; thread < EMULATED_THREADS; ++thread) phase(thread);
  }

  void sync() {
    ++block_phase_;
    ++warp_phase_;
  }

  void sync_warp() { ++warp_phase_; }

  template <int FIRST, int COUNT, int OFFSET, class Values>
  void exchange(Values& values) {
    static_assert(OFFSET < WARP, "threads of other warps are out of reach");
    for (int thread = 0; thread < EMULATED_THREADS; ++thread)
      for (int i = FIRST; i < FIRST + COUNT && !(thread & OFFSET); ++i)
        std::swap(values[thread].at[i], values[thread | OFFSET].at[i]);
  }

  void any_in_warp(PerThread<bool>& flags) {
    for (int first = 0; first < EMULATED_THREADS; first += WARP) {
      bool any = false;
      for (int i = 0; i < WARP; ++i) any = any || flags[first + i];
      for (int i = 0; i < WARP; ++i) flags[first + i] = any;
    }
  }

  template <int N>
  Floats<N> get(int thread, int at) {
    Floats<N> values;
    check(N, at);
    for (int i = 0; i < N && !fault_; ++i) {
      Use& use = uses_[at + i];
      if (use.write.thread == NOBODY) fault_ = "shared memory is read before anything was written";
      if (unordered(use.write, thread)) fault_ = "a read of shared memory may come before the write";
      note(use.read, thread);
      values.at[i] = shared_[at + i];
    }
    return values;
  }

  template <int N>
  void put(int thread, int at, const Floats<N>& values) {
    check(N, at);
    for (int i = 0; i < N && !fault_; ++i) {
      Use& use = uses_[at + i];
      if (unordered(use.write, thread)) fault_ = "two threads write to the same place of shared memory";
      if (unordered(use.read, thread)) fault_ = "a write to shared memory may come before a read of what was there";
      note(use.write, thread);
      shared_[at + i] = values.at[i];
    }
  }

 private:
  static constexpr int NOBODY = -1, SEVERAL = -2;

  // Who used a place since the last barriers: of the block for `warp`, of the warp for `thread`.
  struct Access {
    int thread = NOBODY, warp = NOBODY;
    i64 warp_phase = 0, block_phase = 0;
  };

  struct Use {
    Access read, write;
  };

  void check(int count, int at) {
    if (at < 0 || at + count > static_cast<int>(shared_.size())) fault_ = "shared memory is too small";
    if (at % count) fault_ = "a vector of shared memory is not aligned";
  }

  bool unordered(const Access& access, int thread) const {
    if (access.thread == NOBODY || access.block_phase != block_phase_) return false;
    if (access.warp != thread / WARP) return true;
    return access.warp_phase == warp_phase_ && access.thread != thread;
  }

  void note(Access& access, int thread) const {
    const bool same_block = access.thread != NOBODY && access.block_phase == block_phase_;
    const bool same_warp = same_block && access.warp_phase == warp_phase_;
    access.warp = same_block && access.warp != thread / WARP ? SEVERAL : thread / WARP;
    access.thread = same_warp && access.thread != thread ? SEVERAL : thread;
    access.warp_phase = warp_phase_;
    access.block_phase = block_phase_;
  }

  i64 place_[3];
  std::vector<float> shared_;
  std::vector<Use> uses_;
  i64 warp_phase_ = 0, block_phase_ = 0;
  const char* fault_ = nullptr;
};

// Run a body for every block of a grid; the first fault found, or null.
template <class Body>
const char* emulate(const i64* grid, int shared_floats, Body body) {
  i64 place[3];
  for (place[2] = 0; place[2] < grid[2]; ++place[2])
    for (place[1] = 0; place[1] < grid[1]; ++place[1])
      for (place[0] = 0; place[0] < grid[0]; ++place[0]) {
        EmulatedBlock block(place, shared_floats);
        body(block);
        if (block.fault()) return block.fault();
      }
  return nullptr;
}

}  // namespace mminfer
