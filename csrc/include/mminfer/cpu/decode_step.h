// One step of decoding through all layers of a standard pre-norm decoder, in one parallel region.
//
// A layer is RMS norm, projections to queries, keys and values (biases and norms over the head where there are any),
// rotation of halves, attention over the cache, output projection, residual; RMS norm, gated FFN with SiLU, residual.
// At one row a step the weights are read once and hardly computed with, so everything here is about reading them in
// long streams and about waiting little: five phases a layer, none of which waits for a thread that has no work in hand.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <thread>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "mminfer/cpu/vec.h"

namespace mminfer {
namespace {

struct Linear {
  const float* weight;  // [N, K]
  const float* bias;    // [N] or null
};

// As Python lays it out: 18 pointers in a row.
struct DecodeLayer {
  const float* input_norm;
  Linear q, k, v, o;
  const float *q_norm, *k_norm;  // [D] or null
  const float* post_norm;
  Linear gate, up, down;
};

// As Python lays it out: 5 words in a row. Keys and values are [B, G, capacity, D].
struct DecodeCache {
  float *keys, *values;
  const int64_t* starts;  // [B] or null: the first entry of each row that counts
  int64_t end, capacity;  // the new entry goes to column `end`
};

struct DecodeShape {
  int64_t batch, layers, hidden, heads, groups, head_dim, intermediate;
  int64_t queries() const { return heads * head_dim; }
  int64_t keys() const { return groups * head_dim; }
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

// R rows of a weight times B columns of activations; R * B is a multiple of four.
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
  for (int i = 0; i < R * B; i += 4) sum4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3], out + i);
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

// Rows [from, to) of a linear layer on [batch, k]; from and to are multiples of eight.
inline void linear_rows(Linear linear, const float* x, int64_t batch, int64_t k, int64_t from, int64_t to, bool add,
                        float* out, int64_t stride) {
  constexpr int kRows = kLanes == 16 ? 4 : 2;  // a tile with four columns, in 16 registers of 32 or 8 of 16
  for (int64_t n = from; n < to; n += 8) {
    int64_t b = 0;
    for (; b + 4 <= batch; b += 4)
      for (int r = 0; r < 8; r += kRows) rows_of<kRows, 4>(linear, x + b * k, n + r, k, add, out + b * stride, stride);
    for (; b + 2 <= batch; b += 2)
      for (int r = 0; r < 8; r += 4) rows_of<4, 2>(linear, x + b * k, n + r, k, add, out + b * stride, stride);
    if (b < batch) rows_of<8, 1>(linear, x + b * k, n, k, add, out + b * stride, stride);
  }
}

inline void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
  Vec squares = zero();
  for (int64_t i = 0; i < n; i += kLanes) squares += load(x + i) * load(x + i);
  const Vec factor = broadcast(1.f / std::sqrt(sum(squares) / (float)n + eps));
  for (int64_t i = 0; i < n; i += kLanes) store(out + i, load(weight + i) * (load(x + i) * factor));
}

// A head's query or key: norm if there is one, then rotation.
inline void rotate_head(const float* x, const float* norm, float eps, const float* cos, const float* sin, int64_t size,
                        float factor, float* scratch, float* out) {
  if (norm) rms_norm(x, norm, size, eps, scratch), x = scratch;
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; ++i) {
    out[i] = (x[i] * cos[i] - x[i + half] * sin[i]) * factor;
    out[i + half] = (x[i + half] * cos[i + half] + x[i] * sin[i + half]) * factor;
  }
}

constexpr int64_t kBlock = 64;      // keys whose scores are formed at a time
constexpr int64_t kLeastKeys = 256;  // of a chunk
constexpr float kLog2e = 1.44269504f;

// Scores of `count` keys; the query carries the scale.
inline void scores_of(const float* q, const float* keys, int64_t count, int64_t size, float* out) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    const float* k = keys + j * size;
    Vec a = zero(), b = zero(), c = zero(), d = zero();
    for (int64_t i = 0; i < size; i += kLanes) {
      const Vec x = load(q + i);
      a += x * load(k + i);
      b += x * load(k + size + i);
      c += x * load(k + 2 * size + i);
      d += x * load(k + 3 * size + i);
    }
    sum4(a, b, c, d, out + j);
  }
  for (; j < count; ++j) {
    Vec a = zero();
    for (int64_t i = 0; i < size; i += kLanes) a += load(q + i) * load(keys + j * size + i);
    out[j] = sum(a);
  }
}

// 2^x for x at or below zero, never denormal: those are slow to compute with, and lost in any sum anyway.
inline Vec weight_of(Vec x) { return exp2(max(x, broadcast(-126.f))); }

// One head's attention over some keys: the largest score, the sum of weights, and the weighted values, unnormalised.
struct Partial {
  float largest, total;
  float* values;  // [D]
};

// out += weights . values, so many chunks of a row at a time that they stay in registers.
template <int C>
inline void weighted_values(const float* weights, const float* values, int64_t count, int64_t size, float* out) {
  Vec sums[C];
  for (int c = 0; c < C; ++c) sums[c] = load(out + c * kLanes);
  for (int64_t j = 0; j < count; ++j)
    for (int c = 0; c < C; ++c) sums[c] += broadcast(weights[j]) * load(values + j * size + c * kLanes);
  for (int c = 0; c < C; ++c) store(out + c * kLanes, sums[c]);
}

// Takes a block of at most kBlock keys and values into one head's partial sums.
inline void attend_block(const float* q, const float* keys, const float* values, int64_t count, int64_t size,
                         Partial& part) {
  alignas(64) float weights[kBlock];
  scores_of(q, keys, count, size, weights);
  for (int64_t j = count; j < kBlock; ++j) weights[j] = -1e30f;
  Vec most = broadcast(part.largest);
  for (int64_t j = 0; j < kBlock; j += kLanes) most = max(most, load(weights + j));
  const float largest = mminfer::largest(most);
  Vec total = zero();
  for (int64_t j = 0; j < kBlock; j += kLanes) {
    const Vec w = weight_of(load(weights + j) - largest);
    total += w;
    store(weights + j, w);
  }
  if (largest > part.largest) {
    const Vec shrink = weight_of(broadcast(part.largest - largest));
    for (int64_t i = 0; i < size; i += kLanes) store(part.values + i, load(part.values + i) * shrink);
    part.total *= shrink[0];
    part.largest = largest;
  }
  part.total += sum(total);
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes)
    weighted_values<4>(weights, values + i, count, size, part.values + i);
  for (; i + 2 * kLanes <= size; i += 2 * kLanes)
    weighted_values<2>(weights, values + i, count, size, part.values + i);
  for (; i < size; i += kLanes) weighted_values<1>(weights, values + i, count, size, part.values + i);
}

// Scratch that all threads share, and the split of the attention.
struct DecodeScratch {
  float *q, *k, *v;         // [B, H * D], [B, G * D] twice
  float *gate, *up;         // [B, intermediate]
  float* partials;          // [B, H, chunks, D + kLanes]: largest, total; then the values from kLanes on
  float* threads;           // [threads, B * max(hidden, H * D) + (H / G + 1) * D]
  int64_t chunks, thread_size, count;  // count: of threads
};

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

constexpr int kPhases = 5;  // of a layer

class DecodeStep {
 public:
  DecodeStep(const DecodeShape& shape, float eps, float scale, const float* cos, const float* sin, int64_t table_stride,
             float* hidden, const DecodeScratch& scratch)
      : s(shape), eps(eps), scale(scale), cos(cos), sin(sin), table_stride(table_stride), hidden(hidden), z(scratch) {}

  // What each thread does; `id` tells it its scratch.
  void run(const DecodeLayer* layers, const DecodeCache* caches, Phase* phase, int id) const {
    float* x = z.threads + id * z.thread_size;
    const int64_t projected = s.queries() + 2 * s.keys();
    for (int64_t l = 0; l < s.layers; ++l, phase += kPhases) {
      const DecodeLayer& layer = layers[l];
      phase[0].run(blocks(projected), [&] { normed(layer.input_norm, x); },
                   [&](int64_t i) { project(layer, x, block(projected, i)); });
      phase[1].run(s.batch * s.groups * z.chunks, [] {}, [&](int64_t i) { attend(layer, caches[l], i, x); });
      phase[2].run(blocks(s.hidden), [&] { combine(x); },
                   [&](int64_t i) { add_to_hidden(layer.o, x, s.queries(), block(s.hidden, i)); });
      phase[3].run(blocks(s.intermediate), [&] { normed(layer.post_norm, x); },
                   [&](int64_t i) { gated(layer, x, block(s.intermediate, i)); });
      phase[4].run(blocks(s.hidden), [] {},
                   [&](int64_t i) { add_to_hidden(layer.down, z.gate, s.intermediate, block(s.hidden, i)); });
    }
  }

 private:
  struct Range { int64_t from, to; };

  int64_t blocks(int64_t rows) const { return z.count == 1 ? 1 : std::min(rows / 16, 4 * z.count); }

  // The i-th block of so many rows, in multiples of 16.
  Range block(int64_t rows, int64_t i) const {
    const int64_t units = rows / 16, count = blocks(rows);
    return {units * i / count * 16, units * (i + 1) / count * 16};
  }

  void normed(const float* weight, float* out) const {
    for (int64_t b = 0; b < s.batch; ++b) rms_norm(hidden + b * s.hidden, weight, s.hidden, eps, out + b * s.hidden);
  }

  // Rows of queries, keys and values as one list.
  void project(const DecodeLayer& layer, const float* x, Range all) const {
    const Linear linear[] = {layer.q, layer.k, layer.v};
    float* const out[] = {z.q, z.k, z.v};
    int64_t first = 0;
    for (int i = 0; i < 3; ++i) {
      const int64_t rows = i ? s.keys() : s.queries();
      const int64_t from = std::max<int64_t>(all.from - first, 0), to = std::min(all.to - first, rows);
      linear_rows(linear[i], x, s.batch, s.hidden, from, to, false, out[i], rows);
      first += rows;
    }
  }

  // One group of heads over one chunk of a row's keys. The chunk that holds the new entry writes it first.
  void attend(const DecodeLayer& layer, const DecodeCache& cache, int64_t task, float* scratch) const {
    const int64_t chunk = task % z.chunks, g = task / z.chunks % s.groups, b = task / z.chunks / s.groups;
    const int64_t size = s.head_dim, group = s.heads / s.groups;
    const float *row_cos = cos + b * table_stride, *row_sin = sin + b * table_stride;
    const int64_t start = cache.starts ? cache.starts[b] : 0, length = cache.end + 1 - start;
    const int64_t from = start + length * chunk / z.chunks, to = start + length * (chunk + 1) / z.chunks;
    float* keys = cache.keys + (b * s.groups + g) * cache.capacity * size;
    float* values = cache.values + (b * s.groups + g) * cache.capacity * size;
    float *spare = scratch, *q = scratch + size;
    if (chunk == z.chunks - 1) {
      rotate_head(z.k + (b * s.groups + g) * size, layer.k_norm, eps, row_cos, row_sin, size, 1.f, spare,
                  keys + cache.end * size);
      std::copy_n(z.v + (b * s.groups + g) * size, size, values + cache.end * size);
    }
    for (int64_t h = 0; h < group; ++h) {
      rotate_head(z.q + b * s.queries() + (g * group + h) * size, layer.q_norm, eps, row_cos, row_sin, size,
                  scale * kLog2e, spare, q + h * size);
      float* out = partial(b, g * group + h, chunk);
      out[0] = -1e30f, out[1] = 0.f;
      std::fill_n(out + kLanes, size, 0.f);
    }
    for (int64_t j = from; j < to; j += kBlock) {
      for (int64_t h = 0; h < group; ++h) {
        float* out = partial(b, g * group + h, chunk);
        Partial part{out[0], out[1], out + kLanes};
        attend_block(q + h * size, keys + j * size, values + j * size, std::min(kBlock, to - j), size, part);
        out[0] = part.largest, out[1] = part.total;
      }
    }
  }

  float* partial(int64_t b, int64_t h, int64_t chunk) const {
    return z.partials + ((b * s.heads + h) * z.chunks + chunk) * (s.head_dim + kLanes);
  }

  // The attention's output [B, H * D] from the chunks' shares.
  void combine(float* out) const {
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t h = 0; h < s.heads; ++h, out += s.head_dim) {
        float largest = -1e30f, total = 0.f;
        for (int64_t c = 0; c < z.chunks; ++c) largest = std::max(largest, partial(b, h, c)[0]);
        std::fill_n(out, s.head_dim, 0.f);
        for (int64_t c = 0; c < z.chunks; ++c) {
          const float* part = partial(b, h, c);
          const Vec shrink = weight_of(broadcast(part[0] - largest));
          total += part[1] * shrink[0];
          for (int64_t i = 0; i < s.head_dim; i += kLanes)
            store(out + i, load(out + i) + load(part + kLanes + i) * shrink);
        }
        for (int64_t i = 0; i < s.head_dim; i += kLanes) store(out + i, load(out + i) * (1.f / total));
      }
    }
  }

  void add_to_hidden(Linear linear, const float* x, int64_t k, Range rows) const {
    linear_rows(linear, x, s.batch, k, rows.from, rows.to, true, hidden, s.hidden);
  }

  void gated(const DecodeLayer& layer, const float* x, Range rows) const {
    linear_rows(layer.gate, x, s.batch, s.hidden, rows.from, rows.to, false, z.gate, s.intermediate);
    linear_rows(layer.up, x, s.batch, s.hidden, rows.from, rows.to, false, z.up, s.intermediate);
    for (int64_t b = 0; b < s.batch; ++b) {
      float *gate = z.gate + b * s.intermediate, *up = z.up + b * s.intermediate;
      for (int64_t i = rows.from; i < rows.to; i += kLanes) {
        const Vec g = load(gate + i);
        store(gate + i, g / (exp2(g * -kLog2e) + 1.f) * load(up + i));
      }
    }
  }

  const DecodeShape s;
  const float eps, scale;
  const float *cos, *sin;
  const int64_t table_stride;
  float* const hidden;
  const DecodeScratch z;
};

// How many parts the keys of a row are split into, so that all threads have work.
inline int64_t decode_chunks(const DecodeShape& s, const DecodeCache* caches, int threads) {
  int64_t longest = 0;
  for (int64_t l = 0; l < s.layers; ++l) longest = std::max(longest, caches[l].end + 1);
  const int64_t tasks = s.batch * s.groups, wanted = (4 * threads + tasks - 1) / tasks;
  return threads == 1 ? 1 : std::max<int64_t>(1, std::min(wanted, longest / kLeastKeys));
}

// 0, or 1 where there is no memory for scratch.
inline int decode_step(const DecodeLayer* layers, const DecodeCache* caches, const DecodeShape& s, float eps,
                       float scale, const float* cos, const float* sin, int64_t table_stride, float* hidden,
                       int threads) {
  DecodeScratch z;
  z.count = threads;
  z.chunks = decode_chunks(s, caches, threads);
  z.thread_size = std::max(s.batch * std::max(s.hidden, s.queries()), (s.heads / s.groups + 1) * s.head_dim) + 16;
  const int64_t sizes[] = {s.batch * s.queries(), s.batch * s.keys(), s.batch * s.keys(), s.batch * s.intermediate,
                           s.batch * s.intermediate, s.batch * s.heads * z.chunks * (s.head_dim + kLanes),
                           threads * z.thread_size};
  float** const places[] = {&z.q, &z.k, &z.v, &z.gate, &z.up, &z.partials, &z.threads};
  int64_t total = 0;
  for (const int64_t size : sizes) total += size;
  const std::unique_ptr<float[]> memory(new (std::nothrow) float[total]);
  const std::unique_ptr<Phase[]> phases(new (std::nothrow) Phase[kPhases * s.layers]);
  if (!memory || !phases) return 1;
  float* next = memory.get();
  for (int i = 0; i < 7; ++i) *places[i] = next, next += sizes[i];
  const DecodeStep step(s, eps, scale, cos, sin, table_stride, hidden, z);
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
  step.run(layers, caches, phases.get(), omp_get_thread_num());
#else
  step.run(layers, caches, phases.get(), 0);
#endif
  return 0;
}

}  // namespace
}  // namespace mminfer
