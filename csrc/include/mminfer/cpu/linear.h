// Linear layers on a few rows of activations, where reading the weights is what takes the time; and RMS norm.
#pragma once
#include <cmath>
#include <cstdint>

#include "mminfer/cpu/vec.h"

namespace mminfer {

struct Linear {
  const float* weight;  // [N, K]
  const float* bias;    // [N] or null
};

// The sums of four vectors.
inline void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
#if defined(__AVX2__)
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  auto half = [](Vec x) {
    return _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
  };
#else
  auto half = [](Vec x) { return (__m256)x; };
#endif
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
#endif
}

// R rows of a weight times B columns of activations.
template <int R, int B>
inline void tile(const float* weight, const float* x, int64_t k, float (&out)[R * B]) {
  Vec sums[R * B];
  for (Vec& s : sums) s = zero();
  for (int64_t i = 0; i < k; i += kLanes) {
    Vec columns[B];
    for (int b = 0; b < B; ++b) columns[b] = load(x + b * k + i);
    for (int r = 0; r < R; ++r) {
      const Vec row = load(weight + r * k + i);
      for (int b = 0; b < B; ++b) sums[r * B + b] += row * columns[b];
    }
  }
  int i = 0;
  for (; i + 4 <= R * B; i += 4) sum4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3], out + i);
  for (; i < R * B; ++i) out[i] = sum(sums[i]);
}

// out[b, n] = (out[b, n] if `add`) + bias[n] + weight[n] . x[b] for rows n of R.
template <int R, int B>
inline void rows_of(Linear linear, const float* x, int64_t n, int64_t k, bool add, float* out, int64_t stride) {
  float sums[R * B];
  tile<R, B>(linear.weight + n * k, x, k, sums);
  for (int r = 0; r < R; ++r) {
    const float bias = linear.bias ? linear.bias[n + r] : 0.f;
    for (int b = 0; b < B; ++b) {
      float& y = out[b * stride + n + r];
      y = (add ? y : 0.f) + bias + sums[r * B + b];
    }
  }
}

// Rows [from, to) of a linear layer on [batch, k].
inline void linear_rows(Linear linear, const float* x, int64_t batch, int64_t k, int64_t from, int64_t to, bool add,
                        float* out, int64_t stride) {
  constexpr int kRows = kLanes == 16 ? 4 : 2;  // a tile with four columns, in 16 registers of 32 or 8 of 16
  int64_t n = from;
  for (; n + 8 <= to; n += 8) {
    int64_t b = 0;
    for (; b + 4 <= batch; b += 4)
      for (int r = 0; r < 8; r += kRows) rows_of<kRows, 4>(linear, x + b * k, n + r, k, add, out + b * stride, stride);
    for (; b + 2 <= batch; b += 2)
      for (int r = 0; r < 8; r += 4) rows_of<4, 2>(linear, x + b * k, n + r, k, add, out + b * stride, stride);
    if (b < batch) rows_of<8, 1>(linear, x + b * k, n, k, add, out + b * stride, stride);
  }
  for (; n < to; ++n)
    for (int64_t b = 0; b < batch; ++b) rows_of<1, 1>(linear, x + b * k, n, k, add, out + b * stride, stride);
}

inline void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
  Vec squares = zero();
  for (int64_t i = 0; i < n; i += kLanes) squares += load(x + i) * load(x + i);
  const Vec factor = broadcast(1.f / std::sqrt(sum(squares) / (float)n + eps));
  for (int64_t i = 0; i < n; i += kLanes) store(out + i, load(weight + i) * (load(x + i) * factor));
}

}  // namespace mminfer
