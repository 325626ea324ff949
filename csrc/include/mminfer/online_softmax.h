// The running state of a softmax over keys that come in parts, in base 2: logits are scaled by log2(e) beforehand.
#pragma once

#include "mminfer/scalar.h"

namespace mminfer {

#ifdef __CUDACC__
MMINFER_DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // one instruction, 2 ulp
  return y;
}
MMINFER_DEVICE float larger(float x, float y) { return fmaxf(x, y); }
#else
MMINFER_DEVICE float exp2_of(float x) { return std::exp2(x); }
MMINFER_DEVICE float larger(float x, float y) { return std::fmax(x, y); }
#endif

MMINFER_DEVICE float minus_infinity() { return bit_cast<float>(0xff800000u); }
MMINFER_DEVICE float not_a_number() { return bit_cast<float>(0x7fc00000u); }

// 2^(from - to): what a weight relative to the maximum `from` is relative to `to`. Nothing (-inf) stays nothing.
MMINFER_DEVICE float rescale(float from, float to) { return from == minus_infinity() ? 0.0f : exp2_of(from - to); }

struct OnlineSoftmax {
  float max;  // -inf before any key was seen
  float sum;  // of 2^(logit - max)

  static MMINFER_DEVICE OnlineSoftmax empty() { return {minus_infinity(), 0.0f}; }
};

MMINFER_DEVICE OnlineSoftmax combine(OnlineSoftmax a, OnlineSoftmax b) {
  const float max = larger(a.max, b.max);
  return {max, a.sum * rescale(a.max, max) + b.sum * rescale(b.max, max)};
}

// What a sum over keys is multiplied by to give the output; a row that sees no key gives zeros.
MMINFER_DEVICE float normaliser(OnlineSoftmax state) { return state.sum == 0.0f ? 0.0f : 1.0f / state.sum; }

}  // namespace mminfer
