// Attention of a few query rows over a stretch of keys, both keys and values read once, and the combination of
// stretches. Lanes are elements of a head; the query heads of a group are rows that share what is read.
#pragma once
#include "mminfer/cpu/buffer.h"
#include "mminfer/cpu/vec.h"

namespace mminfer {

constexpr int kStretchKeys = 64;  // of which scores are held at a time
constexpr int kMaxRows = 8;       // query rows that share a pass over the keys
constexpr int kAccumulators = kLanes == 16 ? 24 : 12;
constexpr float kLog2e = 1.44269504f;

inline int64_t padded(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

// Running softmax of rows over the keys seen so far: out is not yet divided by total.
struct Softmax {
  float *out, *top, *total;  // [rows, padded D], [rows], [rows]
};

template <class T>
inline Vec load_row(const T* row, int64_t d, int64_t size) {
  return d + kLanes <= size ? load(row + d) : load_some(row + d, (int)(size - d));
}

// Asks for a row that will be read soon: the next phase's memory comes in while this one computes.
template <class T>
inline void fetch_row(const T* row, int64_t size) {
  for (int64_t d = 0; d < size; d += 64 / (int64_t)sizeof(T)) __builtin_prefetch(row + d);
}

// scores[r][j] = q[r] . k[j] for R rows and `count` keys; q is [R, padded D], zero behind D.
template <int R, bool Whole, class T>
inline void score_rows(const float* q, const T* k, int64_t k_row, int64_t count, int64_t size, const T* next,
                       int64_t next_row, float* scores) {
  const int64_t width = padded(size);
  for (int64_t j = 0; j < count; j += kLanes) {
    const int some = count - j < kLanes ? (int)(count - j) : kLanes;
    Vec part[R][kLanes];
    for (int i = 0; i < some; ++i) {
      const T* key = k + (j + i) * k_row;
      fetch_row(next + (j + i) * next_row, size);
      Vec acc[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r] = zero();
      for (int64_t d = 0; d < width; d += kLanes) {
        const Vec x = Whole ? load(key + d) : load_row(key, d, size);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r] += x * load(q + r * width + d);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) part[r][i] = acc[r];
    }
    for (int i = some; i < kLanes; ++i)
      for (int r = 0; r < R; ++r) part[r][i] = zero();
    for (int r = 0; r < R; ++r) store(scores + r * kStretchKeys + j, sums(part[r]));
  }
}

// out[r] = out[r] * shrink[r] + sum over j of p[r][j] * v[j].
template <int R, class T>
inline void weigh_rows(const float* p, const T* v, int64_t v_row, int64_t count, int64_t size, const float* shrink,
                       const T* next, int64_t next_row, float* out) {
  constexpr int kWide = R * 4 <= kAccumulators ? 4 : R * 2 <= kAccumulators ? 2 : 1;  // of 64 elements no remainder
  const int64_t width = padded(size);
  for (int64_t d = 0; d < width; d += kWide * kLanes) {
    const int vectors = (width - d) / kLanes < kWide ? (int)((width - d) / kLanes) : kWide;
    Vec acc[R][kWide];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < kWide; ++n)
        acc[r][n] = n < vectors ? load(out + r * width + d + n * kLanes) * broadcast(shrink[r]) : zero();
    if (vectors == kWide && d + kWide * kLanes <= size) {
      for (int64_t j = 0; j < count; ++j) {
        if (d == 0) fetch_row(next + j * next_row, size);
        Vec x[kWide];
#pragma GCC unroll 4
        for (int n = 0; n < kWide; ++n) x[n] = load(v + j * v_row + d + n * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vec weight = broadcast(p[r * kStretchKeys + j]);
#pragma GCC unroll 4
          for (int n = 0; n < kWide; ++n) acc[r][n] += weight * x[n];
        }
      }
    } else {
      for (int64_t j = 0; j < count; ++j)
        for (int n = 0; n < vectors; ++n) {
          const Vec x = load_row(v + j * v_row, d + n * kLanes, size);
          for (int r = 0; r < R; ++r) acc[r][n] += broadcast(p[r * kStretchKeys + j]) * x;
        }
    }
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < vectors; ++n) store(out + r * width + d + n * kLanes, acc[r][n]);
  }
}

// Adds to each key's score the logarithm of what the key stands for.
inline void add_log_mass(const float* log_mass, int64_t count, float* scores) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) store(scores + j, load(scores + j) + load(log_mass + j) * kLog2e);
  for (; j < count; ++j) scores[j] += log_mass[j] * kLog2e;
}

// Takes `count` more keys into the softmax of R rows. q is scaled by log2(e) / sqrt(D) or so; log_mass: of each of
// these keys, or null; visible[r]: how many of them row r sees.
template <int R, class T>
inline void take_in(const float* q, const T* k, int64_t k_row, const T* v, int64_t v_row, const float* log_mass,
                    int64_t count, int64_t size, const int64_t* visible, Softmax& s) {
  float scores[R * kStretchKeys], shrink[R];
  if (size % kLanes == 0) score_rows<R, true>(q, k, k_row, count, size, v, v_row, scores);
  else score_rows<R, false>(q, k, k_row, count, size, v, v_row, scores);
  for (int r = 0; r < R; ++r) {
    float* row = scores + r * kStretchKeys;
    if (log_mass) add_log_mass(log_mass, count, row);
    const int64_t whole = (count + kLanes - 1) / kLanes * kLanes, seen = visible[r] < count ? visible[r] : count;
    for (int64_t j = seen > 0 ? seen : 0; j < whole; ++j) row[j] = -INFINITY;
    Vec high = broadcast(s.top[r]);
    for (int64_t j = 0; j < whole; j += kLanes) high = max(high, load(row + j));
    const float top = largest(high);
    Vec total = zero();
    for (int64_t j = 0; j < whole; j += kLanes) {
      const Vec power = exp2(load(row + j) - broadcast(top));
      total += power;
      store(row + j, power);
    }
    shrink[r] = exp2(broadcast(s.top[r] - top))[0];
    s.top[r] = top;
    s.total[r] = s.total[r] * shrink[r] + sum(total);
  }
  weigh_rows<R>(scores, v, v_row, count, size, shrink, k + count * k_row, k_row, s.out);
}

template <class T, int R = kMaxRows>
inline void take_in_rows(int64_t rows, const float* q, const T* k, int64_t k_row, const T* v, int64_t v_row,
                         const float* log_mass, int64_t count, int64_t size, const int64_t* visible, Softmax s) {
  if (rows >= R) {
    take_in<R>(q, k, k_row, v, v_row, log_mass, count, size, visible, s);
    rows -= R, q += R * padded(size), visible += R;
    s.out += R * padded(size), s.top += R, s.total += R;
    if (rows > 0) take_in_rows<T, R>(rows, q, k, k_row, v, v_row, log_mass, count, size, visible, s);
  } else if constexpr (R > 1) {
    take_in_rows<T, R - 1>(rows, q, k, k_row, v, v_row, log_mass, count, size, visible, s);
  }
}

}  // namespace mminfer
