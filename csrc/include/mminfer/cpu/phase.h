// Work in phases inside one parallel region.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mminfer {

// A stretch of work that any number of threads share out block by block. It is over when all blocks are done, whoever
// did them: a thread that the system has put aside between two blocks holds nobody up.
struct alignas(64) Phase {
  std::atomic<int32_t> next{0}, done{0};

  // `prepare` runs once in each thread that gets a block, then `work(i)` for each block it gets.
  template <class Prepare, class Work>
  void run(int64_t blocks, Prepare prepare, Work work) {
    bool prepared = false;
    for (int32_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
      if (!prepared) prepare(), prepared = true;
      work(i);
      done.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; done.load(std::memory_order_acquire) < blocks; ++spins) {
      if (spins > kSpins) std::this_thread::yield();
#if defined(__x86_64__)
      else _mm_pause();
#endif
    }
  }

  static constexpr int kSpins = 200;  // 10 microseconds or so
};

}  // namespace mminfer
