// One step of decoding through all layers of a standard pre-norm decoder, in one parallel region.
//
// A layer is RMS norm, projections to queries, keys and values (biases and norms over the head where there are any),
// rotation of halves, attention over the cache, output projection, residual; RMS norm, gated FFN with SiLU, residual.
// At one row a step the weights are read once and hardly computed with, so everything here is about reading them in
// long streams and about waiting little: five phases a layer, none of which waits for a thread that has no work in hand.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "mminfer/cpu/buffer.h"
#include "mminfer/cpu/decode_attention.h"
#include "mminfer/cpu/linear.h"
#include "mminfer/cpu/parallel.h"
#include "mminfer/cpu/parts.h"
#include "mminfer/cpu/phase.h"
#include "mminfer/cpu/vec.h"

namespace mminfer {

// As Python lays it out: 18 pointers in a row.
struct StepLayer {
  const float* input_norm;
  Linear q, k, v, o;
  const float *q_norm, *k_norm;  // [D] or null
  const float* post_norm;
  Linear gate, up, down;
};

// As Python lays it out: 8 words in a row. Keys and values are rows of D: those of [B, G, capacity, D], or of a packed
// cache, in which each head of a sequence has a segment.
struct StepCache {
  float *keys, *values, *log_mass;  // log_mass: [rows] or null
  const int64_t* starts;            // [B] or null: the first entry of each sequence that counts
  const int64_t *first, *lengths;   // [B, G] of a packed cache, or null
  int64_t end, capacity;            // the new entry goes to column `end`; packed, `end` rows behind the length

  int64_t first_of(int64_t segment, int64_t groups) const {
    if (first) return first[segment];
    const int64_t given = starts ? starts[segment / groups] : 0;
    return segment * capacity + (given < 0 ? 0 : given > end ? end : given);
  }
  // With the new entry, which is the last.
  int64_t length_of(int64_t segment, int64_t groups) const {
    return 1 + (first ? lengths[segment] + end : segment * capacity + end - first_of(segment, groups));
  }
};

// The end of the network: final norm and head over the vocabulary, into [B, vocabulary].
struct StepHead {
  const float *norm, *weight;
  float* logits;
};

struct StepShape {
  int64_t batch, layers, hidden, heads, groups, head_dim, intermediate, vocabulary;
  int64_t partial_size() const { return whole_lines(heads / groups * (head_dim + 2)); }  // of a group over a part
  int64_t queries() const { return heads * head_dim; }
  int64_t keys() const { return groups * head_dim; }
};

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

constexpr int64_t kLeastKeys = 256;  // of a part
constexpr int64_t kKeyPartsAThread = 4;

// Scratch that all threads share, and the parts of each layer's attention.
struct StepScratch {
  float *q, *k, *v;  // [B, H * D], [B, G * D] twice
  float *gate, *up;  // [B, intermediate]
  float* partials;   // [slots, partial_size()]
  float* threads;    // [threads, B * max(hidden, H * D) or (H / G + 1) * D]
  const int64_t* all_visible;  // [H / G], large numbers
  const Parts* parts;          // of the keys of each layer
  int64_t thread_size, count;  // count: of threads
};

constexpr int kPhases = 5;  // of a layer

class DecodeStep {
 public:
  DecodeStep(const StepShape& shape, float eps, float scale, const float* cos, const float* sin, int64_t table_stride,
             float* hidden, const StepScratch& scratch)
      : s(shape), eps(eps), scale(scale), cos(cos), sin(sin), table_stride(table_stride), hidden(hidden), z(scratch) {}

  // What each thread does; `id` tells it its scratch.
  void run(const StepLayer* layers, const StepCache* caches, const StepHead& head, Phase* phase, int id) const {
    float* x = z.threads + id * z.thread_size;
    const int64_t projected = s.queries() + 2 * s.keys();
    for (int64_t l = 0; l < s.layers; ++l, phase += kPhases) {
      const StepLayer& layer = layers[l];
      phase[0].run(blocks(projected), [&] { normed(layer.input_norm, x); },
                   [&](int64_t i) { project(layer, x, block(projected, i)); });
      phase[1].run(z.parts[l].count(), [] {}, [&](int64_t i) {
        z.parts[l].each(i, [&](int64_t segment, int64_t from, int64_t to, int64_t slot) {
          attend(layer, caches[l], segment, from, to, partial(slot), x);
        });
      });
      phase[2].run(blocks(s.hidden), [&] { combine(z.parts[l], x); },
                   [&](int64_t i) { add_to_hidden(layer.o, x, s.queries(), block(s.hidden, i)); });
      phase[3].run(blocks(s.intermediate), [&] { normed(layer.post_norm, x); },
                   [&](int64_t i) { gated(layer, x, block(s.intermediate, i)); });
      phase[4].run(blocks(s.hidden), [] {},
                   [&](int64_t i) { add_to_hidden(layer.down, z.gate, s.intermediate, block(s.hidden, i)); });
    }
    phase->run(blocks(s.vocabulary), [&] { normed(head.norm, x); }, [&](int64_t i) {
      const Range rows = block(s.vocabulary, i);
      linear_rows({head.weight, nullptr}, x, s.batch, s.hidden, rows.from, rows.to, false, head.logits, s.vocabulary);
    });
  }

 private:
  struct Range { int64_t from, to; };

  int64_t blocks(int64_t rows) const { return z.count == 1 ? 1 : std::min((rows + 15) / 16, 4 * z.count); }

  // The i-th block of so many rows, in multiples of 16 but for the last.
  Range block(int64_t rows, int64_t i) const {
    const int64_t units = (rows + 15) / 16, count = blocks(rows);
    return {units * i / count * 16, std::min(units * (i + 1) / count * 16, rows)};
  }

  void normed(const float* weight, float* out) const {
    for (int64_t b = 0; b < s.batch; ++b) rms_norm(hidden + b * s.hidden, weight, s.hidden, eps, out + b * s.hidden);
  }

  // Rows of queries, keys and values as one list.
  void project(const StepLayer& layer, const float* x, Range all) const {
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

  // One group of heads over rows [from, to) of its segment. Who has the new entry among them writes it first.
  void attend(const StepLayer& layer, const StepCache& cache, int64_t segment, int64_t from, int64_t to, Softmax state,
              float* scratch) const {
    const int64_t g = segment % s.groups, b = segment / s.groups, size = s.head_dim, group = s.heads / s.groups;
    const float *row_cos = cos + b * table_stride, *row_sin = sin + b * table_stride;
    const int64_t first = cache.first_of(segment, s.groups), last = cache.length_of(segment, s.groups) - 1;
    float *keys = cache.keys + first * size, *values = cache.values + first * size;
    float *log_mass = cache.log_mass ? cache.log_mass + first : nullptr, *spare = scratch, *q = scratch + size;
    if (to > last) {
      rotate_head(z.k + segment * size, layer.k_norm, eps, row_cos, row_sin, size, 1.f, spare, keys + last * size);
      std::copy_n(z.v + segment * size, size, values + last * size);
      if (log_mass) log_mass[last] = 0.f;
    }
    for (int64_t h = 0; h < group; ++h)
      rotate_head(z.q + b * s.queries() + (g * group + h) * size, layer.q_norm, eps, row_cos, row_sin, size,
                  scale * kLog2e, spare, q + h * size);
    std::fill_n(state.out, group * size, 0.f);
    std::fill_n(state.top, group, -1e30f);
    std::fill_n(state.total, group, 0.f);
    for (int64_t j = from; j < to; j += kStretchKeys)
      take_in_rows<float>(group, q, keys + j * size, size, values + j * size, size, log_mass ? log_mass + j : nullptr,
                          std::min<int64_t>(kStretchKeys, to - j), size, z.all_visible, state);
  }

  Softmax partial(int64_t slot) const {
    const int64_t group = s.heads / s.groups;
    float* out = z.partials + slot * s.partial_size();
    return {out, out + group * s.head_dim, out + group * (s.head_dim + 1)};
  }

  // The attention's output [B, H * D] from the parts' shares.
  void combine(const Parts& parts, float* out) const {
    const int64_t group = s.heads / s.groups, size = s.head_dim;
    for (int64_t segment = 0; segment < s.batch * s.groups; ++segment) {
      const int64_t first = parts.first_slot(segment), behind = parts.last_slot(segment) + 1;
      for (int64_t h = 0; h < group; ++h, out += size) {
        float top = -1e30f, total = 0.f;
        for (int64_t i = first; i < behind; ++i) top = std::max(top, partial(i).top[h]);
        std::fill_n(out, size, 0.f);
        for (int64_t i = first; i < behind; ++i) {
          const Softmax part = partial(i);
          const Vec shrink = exp2(broadcast(part.top[h] - top));
          total += part.total[h] * shrink[0];
          for (int64_t d = 0; d < size; d += kLanes)
            store(out + d, load(out + d) + load(part.out + h * size + d) * shrink);
        }
        for (int64_t d = 0; d < size; d += kLanes) store(out + d, load(out + d) * broadcast(1.f / total));
      }
    }
  }

  void add_to_hidden(Linear linear, const float* x, int64_t k, Range rows) const {
    linear_rows(linear, x, s.batch, k, rows.from, rows.to, true, hidden, s.hidden);
  }

  void gated(const StepLayer& layer, const float* x, Range rows) const {
    linear_rows(layer.gate, x, s.batch, s.hidden, rows.from, rows.to, false, z.gate, s.intermediate);
    linear_rows(layer.up, x, s.batch, s.hidden, rows.from, rows.to, false, z.up, s.intermediate);
    for (int64_t b = 0; b < s.batch; ++b) {
      float *gate = z.gate + b * s.intermediate, *up = z.up + b * s.intermediate;
      for (int64_t i = rows.from; i < rows.to; i += kLanes) {
        const Vec g = load(gate + i);
        const Vec power = max(g * kLog2e, broadcast(-126.f));  // exp2 has no larger results than 2^127
        store(gate + i, g / (exp2(-power) + 1.f) * load(up + i));
      }
    }
  }

  const StepShape s;
  const float eps, scale;
  const float *cos, *sin;
  const int64_t table_stride;
  float* const hidden;
  const StepScratch z;
};

// Into `ends`, the rows of a layer up to the end of each segment; its parts, so that all threads have work.
inline Parts key_parts(const StepShape& s, const StepCache& cache, int threads, int64_t* ends) {
  const int64_t segments = s.batch * s.groups;
  ends[0] = 0;
  for (int64_t i = 0; i < segments; ++i) ends[i + 1] = ends[i] + cache.length_of(i, s.groups);
  const int64_t wanted = threads == 1 ? 1 : std::min(kKeyPartsAThread * threads, ends[segments] / kLeastKeys);
  return {ends, segments, std::max<int64_t>(1, wanted)};
}

// Throws std::bad_alloc before anything is written.
inline void decode_step(const StepLayer* layers, const StepCache* caches, const StepHead& head, const StepShape& s,
                        float eps, float scale, const float* cos, const float* sin, int64_t table_stride, float* hidden,
                        int threads) {
  StepScratch z;
  z.count = threads;
  const int64_t segments = s.batch * s.groups;
  const std::unique_ptr<int64_t[]> ends(new int64_t[s.layers * (segments + 1)]);
  std::vector<Parts> parts;
  int64_t slots = 0;
  for (int64_t l = 0; l < s.layers; ++l) {
    parts.push_back(key_parts(s, caches[l], threads, &ends[l * (segments + 1)]));
    slots = std::max(slots, parts.back().slots());
  }
  z.parts = parts.data();
  z.thread_size = std::max(s.batch * std::max(s.hidden, s.queries()), (s.heads / s.groups + 1) * s.head_dim) + 16;
  const std::vector<int64_t> all_visible(s.heads / s.groups, INT64_MAX);
  z.all_visible = all_visible.data();
  const int64_t sizes[] = {s.batch * s.queries(), s.batch * s.keys(), s.batch * s.keys(), s.batch * s.intermediate,
                           s.batch * s.intermediate, slots * s.partial_size(),
                           threads * z.thread_size};
  float** const places[] = {&z.q, &z.k, &z.v, &z.gate, &z.up, &z.partials, &z.threads};
  int64_t total = 0;
  for (const int64_t size : sizes) total += whole_lines(size);
  const Buffer memory(total);
  const std::unique_ptr<Phase[]> phases(new Phase[kPhases * s.layers + 1]);
  float* next = memory.data;
  for (int i = 0; i < 7; ++i) *places[i] = next, next += whole_lines(sizes[i]);
  const DecodeStep step(s, eps, scale, cos, sin, table_stride, hidden, z);
#pragma omp parallel num_threads(threads)
  {
    const NoDenormals inside;
    step.run(layers, caches, head, phases.get(), omp_get_thread_num());
  }
}

}  // namespace mminfer
