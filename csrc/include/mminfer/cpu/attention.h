// Causal attention by blocks of query rows, the softmax in float32, and the sums or maxima of its columns.
//
// Query rows are the lanes. A block holds NV "slots" of kLanes rows, of one head each where columns are told of by
// head, else of any heads that share the keys: then few queries fill the lanes as well. The queries of a block lie
// transposed, [D][NV * kLanes], so keys and values are read in place, element by element, and every softmax
// statistic is a vector: no reduction across lanes, no copy of keys.
#pragma once
#include "mminfer/cpu/buffer.h"
#include "mminfer/cpu/vec.h"

namespace mminfer {

constexpr int kTileKeys = 64;
constexpr int kSlots = 3;

struct Rows3 {  // strides of [B, heads, rows, D] in elements; D is contiguous
  int64_t batch, head, row;
};

template <class T>
const T* at(const T* base, const Rows3& stride, int64_t batch, int64_t head, int64_t row = 0) {
  return base ? base + batch * stride.batch + head * stride.head + row * stride.row : nullptr;
}

struct AttentionArgs {
  const void *q, *k, *v;
  void* out;             // [B, H, S, D] in the type of q; null: scores alone
  float* mass;           // [parts, B, H, N], the votes that each key gets; null: none
  float* peak;           // [parts, B, G, counted], the largest probability that each key gets; null: none
  const float* weights;  // [B, H, S] by its strides; null: 1
  const float* log_mass; // [B, G, N] by its strides, added to the logits; null: 0
  const int64_t* places; // [S], of packed keys from the end on; null: the last S of the N keys
  const int64_t *first, *lengths;  // [G], of packed keys the rows of each head; null: each has all N
  int64_t batch, heads, groups, queries, keys, head_dim;
  Rows3 q_stride, k_stride, v_stride, out_stride, weight_stride, log_mass_stride;
  int64_t window;  // 0: none
  int64_t causal, parts, iterations, threads;
  int64_t counted;  // keys from the first on whose probabilities are looked at
  float scale;
};

// What the queries of one key head read: so many rows.
template <class T>
struct KeyHead {
  const T *keys, *values;
  const float* log_mass;
  int64_t count;

  KeyHead(const AttentionArgs& x, int64_t batch, int64_t group) {
    const int64_t row = x.first ? x.first[group] : 0;
    keys = at(static_cast<const T*>(x.k), x.k_stride, batch, group, row);
    values = at(static_cast<const T*>(x.v), x.v_stride, batch, group, row);
    log_mass = at(x.log_mass, x.log_mass_stride, batch, group, row);
    count = x.lengths ? x.lengths[group] : x.keys;
  }
};

// Rows of keys or values as floats: in place, or converted into a buffer of [kTileKeys, D].
template <class T>
struct Panel {
  const float* data;
  int64_t stride;
  Panel(const T* rows, int64_t row, int64_t count, int64_t size, float* buffer) : data(buffer), stride(size) {
    for (int64_t j = 0; j < count; ++j) {
      const T* from = rows + j * row;
      float* to = buffer + j * size;
      int64_t d = 0;
      for (; d + kLanes <= size; d += kLanes) store(to + d, load(from + d));
      for (; d < size; ++d) to[d] = to_float(from[d]);
    }
  }
};
template <>
struct Panel<float> {
  const float* data;
  int64_t stride;
  Panel(const float* rows, int64_t row, int64_t, int64_t, float*) : data(rows), stride(row) {}
};

// out[m][n] = keep[n] * out[m][n] + sum over k of a[m * row + k * step] * b[k][n], for M rows of NV vectors.
template <int M, int NV, bool Keep>
inline void multiply(const float* a, int64_t row, int64_t step, const float* b, int64_t steps, const Vec* keep,
                     float* out) {
  constexpr int R = NV * kLanes;
  Vec acc[M][NV];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) acc[m][n] = Keep ? load(out + m * R + n * kLanes) * keep[n] : zero();
  for (int64_t k = 0; k < steps; ++k, a += step, b += R) {
    Vec right[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) right[n] = load(b + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec left = broadcast(a[m * row]);
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) acc[m][n] += left * right[n];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) store(out + m * R + n * kLanes, acc[m][n]);
}

// The same for any number of rows, the tallest tiles first.
template <int NV, bool Keep, int M = kTileRows>
inline void multiply_rows(int64_t rows, const float* a, int64_t row, int64_t step, const float* b, int64_t steps,
                          const Vec* keep, float* out) {
  for (; rows >= M; rows -= M, a += M * row, out += M * NV * kLanes)
    multiply<M, NV, Keep>(a, row, step, b, steps, keep, out);
  if constexpr (M > 1) {
    if (rows > 0) multiply_rows<NV, Keep, M / 2>(rows, a, row, step, b, steps, keep, out);
  }
}

// Queries of a block and the keys that they see.
template <int NV>
struct Block {
  static constexpr int R = NV * kLanes;
  int64_t query[NV][kLanes], head[NV][kLanes];  // of each lane
  int count[NV];                                // how many lanes are real
  IntVec last_key[NV], first_key[NV];      // that each lane sees
  int64_t keys;                            // that there are
  int64_t begin, end;                      // keys that any lane sees
  int64_t all_begin, all_end;              // keys that every lane sees

  int64_t place(const AttentionArgs& x, int64_t query) const {
    if (x.places) return x.places[query] + (x.lengths ? keys : 0);
    return query + keys - x.queries;
  }

  void find_keys(const AttentionArgs& x) {
    begin = keys, end = 0, all_begin = 0, all_end = keys;
    for (int n = 0; n < NV; ++n)
      for (int i = 0; i < kLanes; ++i) {
        const int64_t last = x.causal ? place(x, query[n][i < count[n] ? i : count[n] - 1]) : keys - 1;
        const int64_t from = x.window && last + 1 > x.window ? last + 1 - x.window : 0;
        last_key[n][i] = (int32_t)last;
        first_key[n][i] = (int32_t)from;
        begin = from < begin ? from : begin;
        all_begin = from > all_begin ? from : all_begin;
        end = last + 1 > end ? last + 1 : end;
        all_end = last + 1 < all_end ? last + 1 : all_end;
      }
  }

  // [D][R], times the scale.
  template <class T>
  void load_queries(const AttentionArgs& x, const T* q, float* to) const {
    const Vec scale = broadcast(x.scale * 1.44269504f);
    for (int n = 0; n < NV; ++n) {
      const T* rows[kLanes];
      for (int i = 0; i < count[n]; ++i) rows[i] = q + head[n][i] * x.q_stride.head + query[n][i] * x.q_stride.row;
      for (int64_t d = 0; d < x.head_dim; d += kLanes) {
        const int width = x.head_dim - d < kLanes ? (int)(x.head_dim - d) : kLanes;
        Vec part[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          part[i] = i >= count[n] ? zero() : width == kLanes ? load(rows[i] + d) : load_some(rows[i] + d, width);
        }
        transpose(part);
        for (int i = 0; i < width; ++i) store(to + (d + i) * R + n * kLanes, part[i] * scale);
      }
    }
  }

  // The rows of out from [D][R], times a factor for each lane.
  template <class T>
  void store_rows(const AttentionArgs& x, const float* from, const Vec* factor, T* out) const {
    for (int n = 0; n < NV; ++n) {
      T* rows[kLanes];
      for (int i = 0; i < count[n]; ++i)
        rows[i] = out + head[n][i] * x.out_stride.head + query[n][i] * x.out_stride.row;
      for (int64_t d = 0; d < x.head_dim; d += kLanes) {
        const int width = x.head_dim - d < kLanes ? (int)(x.head_dim - d) : kLanes;
        Vec part[kLanes];
        for (int i = 0; i < kLanes; ++i)
          part[i] = i < width ? load(from + (d + i) * R + n * kLanes) * factor[n] : zero();
        transpose(part);
        for (int i = 0; i < count[n]; ++i) store_row(rows[i] + d, part[i], width);
      }
    }
  }

 private:
  static void store_row(float* to, Vec v, int width) { width == kLanes ? store(to, v) : store_some(to, v, width); }
  template <class T>
  static void store_row(T* to, Vec v, int width) { store_some(to, v, width); }
};

inline int64_t tiles_of(int64_t keys) { return (keys + kTileKeys - 1) / kTileKeys; }

// What a thread needs for blocks of up to kSlots slots: the powers of the tiles that are kept, and of one other.
struct Scratch {
  static constexpr int R = kSlots * kLanes;
  Buffer queries, values, panel, probabilities, tile_max;
  Vec top[kSlots], total[kSlots];  // largest logit and sum of powers of each row

  Scratch(const AttentionArgs& x, bool keep)
      : queries(x.head_dim * R), values(x.head_dim * R), panel(kTileKeys * x.head_dim),
        probabilities((keep ? tiles_of(x.counted) + 1 : 1) * kTileKeys * R),
        tile_max(keep ? tiles_of(x.counted) * R : 0) {}
};

// Lanes that do not see their key drop out of the tile.
template <int NV>
inline void hide(const Block<NV>& block, int64_t start, int64_t count, float* p) {
  const Vec nothing = broadcast(-INFINITY);
  for (int64_t j = 0; j < count; ++j)
    for (int n = 0; n < NV; ++n) {
      const IntVec key = (int32_t)(start + j) - IntVec{};
      float* at = p + (j * NV + n) * kLanes;
      store(at, (key <= block.last_key[n]) & (key >= block.first_key[n]) ? load(at) : nothing);
    }
}

// Adds to the logits of each key the logarithm of how many it stands for.
template <int NV>
inline void weigh(const float* log_mass, int64_t stride, int64_t count, float* p) {
  for (int64_t j = 0; j < count; ++j)
    for (int n = 0; n < NV; ++n) {
      float* at = p + (j * NV + n) * kLanes;
      store(at, load(at) + log_mass[j * stride] * 1.44269504f);
    }
}

// p becomes 2^(p - largest so far), whose sums and maxima go on; gives by what earlier tiles' powers shrink.
template <int NV>
inline void soften(int64_t count, float* p, Vec* top, Vec* total, Vec* shrink) {
  Vec high[NV], sum_of[NV];
  for (int n = 0; n < NV; ++n) high[n] = top[n];
  for (int64_t j = 0; j < count; ++j)
    for (int n = 0; n < NV; ++n) high[n] = max(high[n], load(p + (j * NV + n) * kLanes));
  for (int n = 0; n < NV; ++n) {
    shrink[n] = exp2(top[n] - high[n]);
    top[n] = high[n];
    sum_of[n] = total[n] * shrink[n];
  }
  for (int64_t j = 0; j < count; ++j)
    for (int n = 0; n < NV; ++n) {
      const Vec power = exp2(load(p + (j * NV + n) * kLanes) - high[n]);
      sum_of[n] += power;
      store(p + (j * NV + n) * kLanes, power);
    }
  for (int n = 0; n < NV; ++n) total[n] = sum_of[n];
}

// One block against all keys it sees. With `Keep` the powers of the counted keys stay in the scratch, each tile's
// relative to the maximum in `tile_max`; with values the weighted sums are left in `values`, not yet divided.
template <int NV, class T, bool WithValues, bool Keep>
void attend(const AttentionArgs& x, const Block<NV>& block, const T* q, const KeyHead<T>& head, Scratch& s) {
  constexpr int R = NV * kLanes;
  block.load_queries(x, q, s.queries.data);
  for (int n = 0; n < NV; ++n) s.top[n] = broadcast(-1e30f), s.total[n] = zero();
  if (WithValues) s.values.clear(x.head_dim * R);
  const int64_t kept = Keep ? tiles_of(x.counted) : 0;
  for (int64_t start = block.begin, tile = 0; start < block.end; start += kTileKeys, ++tile) {
    const int64_t count = block.end - start < kTileKeys ? block.end - start : kTileKeys;
    float* p = s.probabilities.data + (tile < kept ? tile : kept) * kTileKeys * R;
    const Panel<T> keys(head.keys + start * x.k_stride.row, x.k_stride.row, count, x.head_dim, s.panel.data);
    multiply_rows<NV, false>(count, keys.data, keys.stride, 1, s.queries.data, x.head_dim, nullptr, p);
    if (head.log_mass)
      weigh<NV>(head.log_mass + start * x.log_mass_stride.row, x.log_mass_stride.row, count, p);
    if (start < block.all_begin || start + count > block.all_end) hide<NV>(block, start, count, p);
    Vec shrink[NV];
    soften<NV>(count, p, s.top, s.total, shrink);
    if (tile < kept)
      for (int n = 0; n < NV; ++n) store(s.tile_max.data + tile * R + n * kLanes, s.top[n]);
    if (WithValues) {
      const Panel<T> values(head.values + start * x.v_stride.row, x.v_stride.row, count, x.head_dim, s.panel.data);
      multiply_rows<NV, true>(x.head_dim, values.data, 1, values.stride, p, count, shrink, s.values.data);
    }
  }
}

// Takes `factor * p` of all lanes, none of it negative where `Op` is not the sum, into `to` of each key; of NV vectors
// every `row` floats.
template <class Op, int NV>
inline void fold_columns(const float* p, int64_t row, int64_t count, const Vec* factor, float* to) {
  Vec part[kLanes];
  for (int64_t j = 0; j < count; j += kLanes) {
    const int width = count - j < kLanes ? (int)(count - j) : kLanes;
    for (int i = 0; i < kLanes; ++i) {
      part[i] = zero();
      if (i < width)
        for (int n = 0; n < NV; ++n) part[i] = Op::of(part[i], load(p + (j + i) * row + n * kLanes) * factor[n]);
    }
    const Vec all = fold<Op>(part);
    if (width == kLanes) store(to + j, Op::of(load(to + j), all));
    else store_some(to + j, Op::of(load_some(to + j, width), all), width);
  }
}

}  // namespace mminfer
