// Units of work over threads, each thread with scratch of its own.
#pragma once
#include <cstdint>
#include <new>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mminfer {

// Denormals count as zero while it lives, in this thread alone: each would cost a hundred cycles, and probabilities
// far below the largest are full of them.
class NoDenormals {
#if defined(__x86_64__)
  unsigned before_ = _mm_getcsr();

 public:
  NoDenormals() { _mm_setcsr(before_ | 0x8040); }  // flush to zero, denormals are zero
  ~NoDenormals() { _mm_setcsr(before_); }
#endif
};

// Calls unit(i, scratch) for i in 0 .. count-1, whoever is free takes the next. 1 where memory ran out, else 0.
template <class MakeScratch, class Unit>
int parallel_for(int64_t count, int64_t threads, const MakeScratch& make_scratch, const Unit& unit) {
  int failed = 0;
  int64_t next = 0;
  const int team = static_cast<int>(threads < count ? threads : count);
#pragma omp parallel num_threads(team > 0 ? team : 1)
  {
    const NoDenormals inside;
    try {
      auto scratch = make_scratch();
      for (;;) {
        int64_t i;
#pragma omp atomic capture
        i = next++;
        if (i >= count) break;
        unit(i, scratch);
      }
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      failed = 1;
    }
  }
  return failed;
}

}  // namespace mminfer
