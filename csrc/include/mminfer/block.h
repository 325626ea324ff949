// The thread block as kernel bodies see it, and CUDA's version of it.
//
// A body is written in phases: `block.each(f)` runs f(thread) for every thread, and what a thread keeps from one phase
// to the next lies in a `PerThread<T>`, indexed by thread. On a GPU `each` is one call, a PerThread<T> one T in
// registers, and nothing is left of either after inlining. tests/kernels/emulated/block.h has a version that loops over
// the threads and checks that a barrier stands between a write to shared memory and another thread's use of it.
//
// Barriers and exchanges stand between phases, never inside one: all threads reach them.
#pragma once

#include "mminfer/scalar.h"

namespace mminfer {

template <class T, int N>
struct Array {
  T at[N];
};

template <int N>
struct alignas(sizeof(float) * N) Floats {  // 1, 2 or 4: what one access of shared memory moves
  float at[N];
};

#ifdef __CUDACC__

template <class T>
struct Registers {
  T value;
  MMINFER_DEVICE T& operator[](int) { return value; }
};

class CudaBlock {
 public:
  template <class T>
  using PerThread = Registers<T>;

  MMINFER_DEVICE explicit CudaBlock(float* shared) : shared_(shared) {}

  MMINFER_DEVICE i64 x() const { return blockIdx.x; }
  MMINFER_DEVICE i64 y() const { return blockIdx.y; }
  MMINFER_DEVICE i64 z() const { return blockIdx.z; }

  template <class Phase>
  MMINFER_DEVICE void each(Phase phase) {
    phase(static_cast<int>(threadIdx.x));
  }

  MMINFER_DEVICE void sync() { __syncthreads(); }
  MMINFER_DEVICE void sync_warp() { __syncwarp(); }

  // Elements FIRST .. FIRST + COUNT - 1 of a thread's array become those of the thread whose number differs in bit
  // OFFSET, within its warp.
  template <int FIRST, int COUNT, int OFFSET, class Values>
  MMINFER_DEVICE void exchange(Values& values) {
    MMINFER_UNROLL
    for (int i = FIRST; i < FIRST + COUNT; ++i)
      values[0].at[i] = __shfl_xor_sync(0xffffffffu, values[0].at[i], OFFSET);
  }

  // A flag becomes whether any thread of the warp had it set.
  MMINFER_DEVICE void any_in_warp(Registers<bool>& flags) { flags[0] = __any_sync(0xffffffffu, flags[0]); }

  // N floats of shared memory at a multiple of N.
  template <int N>
  MMINFER_DEVICE Floats<N> get(int, int at) const {
    return *reinterpret_cast<const Floats<N>*>(shared_ + at);
  }

  template <int N>
  MMINFER_DEVICE void put(int, int at, const Floats<N>& values) {
    *reinterpret_cast<Floats<N>*>(shared_ + at) = values;
  }

 private:
  float* shared_;
};

#endif

}  // namespace mminfer
