// Storage types of tensors and 16-byte vectors of them; all arithmetic is in float. No header of CUDA or C++ is needed,
// so NVRTC compiles this with no include path but ours.
#pragma once

#ifdef __CUDACC__
#define MMINFER_DEVICE __device__ __forceinline__
#define MMINFER_UNROLL _Pragma("unroll")
#else
#include <cmath>
#include <cstring>
#define MMINFER_DEVICE inline
#define MMINFER_UNROLL
#endif

namespace mminfer {

using i64 = long long;
using u16 = unsigned short;
using u32 = unsigned int;

struct Bf16 {
  u16 bits;
};

struct Fp16 {
  u16 bits;
};

template <class To, class From>
MMINFER_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
#ifdef __CUDACC__
  return *reinterpret_cast<To*>(&from);
#else
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
#endif
}

MMINFER_DEVICE float to_float(float x) { return x; }

MMINFER_DEVICE float to_float(Bf16 x) { return bit_cast<float>(static_cast<u32>(x.bits) << 16); }

MMINFER_DEVICE float to_float(Fp16 x) {
#ifdef __CUDACC__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const u32 sign = static_cast<u32>(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023;
  if (exponent == 0) return bit_cast<float>(sign | bit_cast<u32>(std::ldexp(static_cast<float>(fraction), -24)));
  if (exponent == 31) return bit_cast<float>(sign | 0x7f800000u | fraction << 13);
  return bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
#endif
}

MMINFER_DEVICE void from_float(float x, float& y) { y = x; }

// Both round to the nearest, ties to even.
MMINFER_DEVICE void from_float(float x, Bf16& y) {
#ifdef __CUDACC__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  const u32 bits = bit_cast<u32>(x);
  y.bits = static_cast<u16>(x != x ? 0x7fffu : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
}

MMINFER_DEVICE void from_float(float x, Fp16& y) {
#ifdef __CUDACC__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  const u32 bits = bit_cast<u32>(x), sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffffu;
  u32 half = 0x7fffu;                                                   // what a NaN becomes
  if (size <= 0x7f800000u) half = 0x7c00u;                              // infinite, or too large
  if (size < 0x477ff000u) half = (size - 0x38000000u + 0xfff + ((size >> 13) & 1)) >> 13;
  if (size < 0x38800000u) half = static_cast<u32>(std::nearbyint(std::ldexp(bit_cast<float>(size), 24)));  // subnormal
  y.bits = static_cast<u16>(sign | half);
#endif
}

// 16 bytes of a row, as loaded.
template <class T>
struct Vector {
  static constexpr int SIZE = 16 / sizeof(T);
  u32 words[4];
};

MMINFER_DEVICE float element(const Vector<float>& from, int i) { return bit_cast<float>(from.words[i]); }

MMINFER_DEVICE float element(const Vector<Bf16>& from, int i) {
  const u32 word = from.words[i / 2];
  return bit_cast<float>(i % 2 ? word & 0xffff0000u : word << 16);
}

MMINFER_DEVICE float element(const Vector<Fp16>& from, int i) {
  return to_float(Fp16{static_cast<u16>(from.words[i / 2] >> (i % 2 * 16))});
}

MMINFER_DEVICE void place(Vector<float>& to, int i, float x) { to.words[i] = bit_cast<u32>(x); }

template <class T>
MMINFER_DEVICE void place(Vector<T>& to, int i, T x) {
  to.words[i / 2] |= static_cast<u32>(x.bits) << (i % 2 * 16);
}

// One 16-byte load of memory that is read once. Volatile: loads are issued where they are written, ahead of their use.
template <class T>
MMINFER_DEVICE Vector<T> load_whole(const T* from) {
  Vector<T> to;
#ifdef __CUDACC__
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to.words[0]), "=r"(to.words[1]), "=r"(to.words[2]), "=r"(to.words[3])
               : "l"(from));
#else
  std::memcpy(to.words, from, sizeof(to.words));
#endif
  return to;
}

template <class T>
MMINFER_DEVICE void store_whole(T* to, const Vector<T>& from) {
#ifdef __CUDACC__
  *reinterpret_cast<uint4*>(to) = make_uint4(from.words[0], from.words[1], from.words[2], from.words[3]);
#else
  std::memcpy(to, from.words, sizeof(from.words));
#endif
}

// The first `count` elements at `from`, zeros after them. ALIGNED: `from` is at 16 bytes, `count` a multiple of SIZE.
template <bool ALIGNED, class T>
MMINFER_DEVICE Vector<T> load(const T* from, i64 count) {
  Vector<T> to = {};
  if (ALIGNED) {
    if (count > 0) to = load_whole(from);
  } else {
    MMINFER_UNROLL
    for (int i = 0; i < Vector<T>::SIZE; ++i)
      if (i < count) place(to, i, from[i]);
  }
  return to;
}

template <bool ALIGNED, class T>
MMINFER_DEVICE void store(T* to, const float (&values)[Vector<T>::SIZE], i64 count) {
  Vector<T> packed = {};
  MMINFER_UNROLL
  for (int i = 0; i < Vector<T>::SIZE; ++i) {
    T value;
    from_float(values[i], value);
    if (ALIGNED)
      place(packed, i, value);
    else if (i < count)
      to[i] = value;
  }
  if (ALIGNED && count > 0) store_whole(to, packed);
}

}  // namespace mminfer
