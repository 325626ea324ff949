// Vectors of floats as wide as the instruction set this file is compiled for, and the few operations the kernels need.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mminfer {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kTileRows = 8;  // rows of a register tile of three vectors: 24 of 32 registers accumulate
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kTileRows = 4;  // 12 of 16
#else
constexpr int kLanes = 4;
constexpr int kTileRows = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

inline Vec zero() { return Vec{}; }
inline Vec broadcast(float x) { return x - Vec{}; }
inline Vec load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

inline Vec round_nearest(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (Vec)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec magic = broadcast(12582912.f);  // 1.5 * 2^23: what is added has no room for a fraction
  Vec y = x + magic;
  asm("" : "+m"(y));  // or associative arithmetic would take it away again
  return y - magic;
#endif
}

// Lanes of a (0 .. kLanes-1) and b (kLanes ..) by number.
inline Vec shuffle(Vec a, Vec b, IntVec from) {
#if defined(__clang__)
  Vec out;
  for (int i = 0; i < kLanes; ++i) out[i] = from[i] < kLanes ? a[from[i]] : b[from[i] - kLanes];
  return out;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// 2^x within 1e-7 of itself; exactly 0 below -126, so that no denormal slows the sums down; infinite from 128.
inline Vec exp2(Vec x) {
#if !defined(__AVX512F__)
  x = max(x, broadcast(-127.f));
  x = x < 128.f ? x : broadcast(128.f);  // beyond, the exponent below would run into the sign
#endif
  const Vec whole = round_nearest(x), part = x - whole;  // part in [-1/2, 1/2]
  Vec y = broadcast(1.537070482e-4f);
  y = y * part + 1.339984829e-3f;
  y = y * part + 9.618373251e-3f;
  y = y * part + 5.550329035e-2f;
  y = y * part + 2.402264846e-1f;
  y = y * part + 6.931472056e-1f;
  y = y * part + 1.f;
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.f), _CMP_GE_OQ);
  return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)y, (__m512)whole);
#else
  const IntVec exponent = (__builtin_convertvector(whole, IntVec) + 127) << 23;  // 0 at -127: the result is 0
  Vec scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return y * scale;
#endif
}

// Blocks of W lanes, the even-numbered ones of a and b in turn: a0 b0 a2 b2 ...; and the odd-numbered ones.
template <int W>
inline Vec evens(Vec a, Vec b) {
  IntVec from;
  for (int i = 0; i < kLanes; ++i) from[i] = i / (2 * W) * (2 * W) + i % W + (i / W & 1 ? kLanes : 0);
  return shuffle(a, b, from);
}
template <int W>
inline Vec odds(Vec a, Vec b) {
  IntVec from;
  for (int i = 0; i < kLanes; ++i) from[i] = i / (2 * W) * (2 * W) + i % W + W + (i / W & 1 ? kLanes : 0);
  return shuffle(a, b, from);
}

template <int W = kLanes / 2>
inline void transpose(Vec* x) {
  if constexpr (W > 0) {
    for (int i = 0; i < kLanes; ++i) {
      if (i & W) continue;
      const Vec a = x[i], b = x[i + W];
      x[i] = evens<W>(a, b);
      x[i + W] = odds<W>(a, b);
    }
    transpose<W / 2>(x);
  }
}

struct Sum { static Vec of(Vec a, Vec b) { return a + b; } };
struct Largest { static Vec of(Vec a, Vec b) { return max(a, b); } };

// Lane i of the result is what `Op` makes of the lanes of x[i]; x is overwritten.
template <class Op, int W = kLanes / 2>
inline Vec fold(Vec* x) {
  if constexpr (W == 0) return x[0];
  else {
    for (int i = 0; i < W; ++i) x[i] = Op::of(evens<W>(x[i], x[i + W]), odds<W>(x[i], x[i + W]));
    return fold<Op, W / 2>(x);
  }
}
inline Vec sums(Vec* x) { return fold<Sum>(x); }

inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
#endif
}

inline float largest(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#endif
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float to_float(Float16 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  uint32_t bits = (magnitude << 13) + (112u << 23);
  if (magnitude >= 0x7c00) bits += 112u << 23;  // infinity and not-a-number
  float y;
  if (magnitude < 0x0400) {  // subnormal
    y = (float)magnitude * 5.9604645e-8f;
    std::memcpy(&bits, &y, 4);
  }
  bits |= sign;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, BFloat16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) { out.bits = 0x7fc0; return; }
  out.bits = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}
inline void from_float(float x, Float16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x47800000) {  // beyond 65,504 and a half step: infinity; not-a-number stays one
    out.bits = (uint16_t)(sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00));
  } else if (magnitude < 0x38800000) {  // subnormal: the adder rounds at 2^-24
    float y;
    std::memcpy(&y, &magnitude, 4);
    y += 0.5f;
    std::memcpy(&bits, &y, 4);
    out.bits = (uint16_t)(sign | (bits - 0x3f000000));
  } else {
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    out.bits = (uint16_t)(sign | ((rounded - (112u << 23)) >> 13));
  }
}

inline Vec load(const BFloat16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
#elif defined(__AVX2__)
  return (Vec)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

inline Vec load(const Float16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// The first `count` lanes; the others are zero.
template <class T>
inline Vec load_some(const T* p, int count) {
  Vec v = zero();
  for (int i = 0; i < count; ++i) v[i] = to_float(p[i]);
  return v;
}

template <class T>
inline void store_some(T* p, Vec v, int count) {
  for (int i = 0; i < count; ++i) from_float(v[i], p[i]);
}

}  // namespace mminfer
