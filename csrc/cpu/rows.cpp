// Rows gathered, added, merged, normalised: plain C entry points. Every output element has one thread, which sums in
// the order of the sources, so results never depend on the number of threads.
#include <cmath>

#include "mminfer/cpu/buffer.h"
#include "mminfer/cpu/parallel.h"
#include "mminfer/cpu/vec.h"

namespace mminfer {

struct None {};
constexpr int64_t kColumns = 1024;  // of a row that one unit of work takes

// to[0 .. count) = f(vectors at the same places of the operands).
template <class To, class F>
inline void each(int64_t count, To* to, const F& f) {
  int64_t d = 0;
  if constexpr (sizeof(To) == 4)
    for (; d + kLanes <= count; d += kLanes) store(to + d, f(d, kLanes));
  for (; d < count; d += kLanes) {
    const int some = count - d < kLanes ? (int)(count - d) : kLanes;
    store_some(to + d, f(d, some), some);
  }
}

template <class T>
inline Vec get(const T* p, int64_t d, int some) {
  return some == kLanes ? load(p + d) : load_some(p + d, some);
}

struct MergeArgs {
  const void *dst, *src;
  const int64_t* index;                    // [B, S]
  const float *dst_weight, *src_weight;    // [B, T], [B, S]; null: 1
  void* merged;                            // [B, T, C]
  float* weight;                           // [B, T]
  int64_t batch, targets, sources, columns;
  int64_t dst_batch, dst_row, src_batch, src_row;  // strides
  int64_t threads;
};

template <class T>
int merge_rows(const MergeArgs& x) {
  const int64_t wide = x.batch >= x.threads || x.columns <= kColumns ? x.columns : kColumns;
  const int64_t chunks = (x.columns + wide - 1) / wide;
  const auto unit = [&](int64_t i, Buffer& sum_of) {
    const int64_t batch = i / chunks, from = i % chunks * wide;
    const int64_t columns = x.columns - from < wide ? x.columns - from : wide;
    const T* dst = static_cast<const T*>(x.dst) + batch * x.dst_batch + from;
    const T* src = static_cast<const T*>(x.src) + batch * x.src_batch + from;
    const int64_t* index = x.index + batch * x.sources;
    const auto weight_of = [&](const float* given, int64_t rows, int64_t row) {
      return given ? given[batch * rows + row] : 1.f;
    };
    Buffer shared_weight(x.targets);
    float* weight = shared_weight.data;
    for (int64_t t = 0; t < x.targets; ++t) {
      weight[t] = weight_of(x.dst_weight, x.targets, t);
      const Vec factor = broadcast(weight[t]);
      each(columns, sum_of.data + t * wide, [&](int64_t d, int some) { return get(dst + t * x.dst_row, d, some) * factor; });
    }
    for (int64_t s = 0; s < x.sources; ++s) {
      const float votes = weight_of(x.src_weight, x.sources, s);
      float* to = sum_of.data + index[s] * wide;
      weight[index[s]] += votes;
      each(columns, to, [&](int64_t d, int some) {
        return get(to, d, some) + get(src + s * x.src_row, d, some) * broadcast(votes);
      });
    }
    for (int64_t t = 0; t < x.targets; ++t) {
      const Vec share = broadcast(1.f / weight[t]);
      T* to = static_cast<T*>(x.merged) + (batch * x.targets + t) * x.columns + from;
      each(columns, to, [&](int64_t d, int some) { return get(sum_of.data + t * wide, d, some) * share; });
      if (from == 0) x.weight[batch * x.targets + t] = weight[t];
    }
  };
  return parallel_for(x.batch * chunks, x.threads, [&] { return Buffer(x.targets * wide); }, unit);
}

struct RowsArgs {
  const void* x;        // [B, N, C]
  const void* other;    // rows to add [B, K, C], or a norm's weight [C]
  const int64_t* index; // [B, K], or [K] for all
  void* out;
  int64_t batch, rows, picked, columns;
  int64_t x_batch, x_row, other_batch, other_row, index_batch;  // strides
  int64_t threads;
  float eps;
};

// The rows at `index`, normalised to a mean square of 1 and weighted; norms are kept in float32.
template <class T>
int gather_rms_norm(const RowsArgs& x) {
  constexpr int64_t kRows = 16;
  const int64_t chunks = (x.picked + kRows - 1) / kRows;
  const T* weight = static_cast<const T*>(x.other);
  return parallel_for(x.batch * chunks, x.threads, [] { return None{}; }, [&](int64_t i, None&) {
    const int64_t batch = i / chunks, first = i % chunks * kRows;
    for (int64_t k = first; k < first + kRows && k < x.picked; ++k) {
      const T* row = static_cast<const T*>(x.x) + batch * x.x_batch + x.index[batch * x.index_batch + k] * x.x_row;
      Vec squares = zero();
      for (int64_t d = 0; d < x.columns; d += kLanes) {
        const Vec part = get(row, d, x.columns - d < kLanes ? (int)(x.columns - d) : kLanes);
        squares += part * part;
      }
      const Vec factor = broadcast(1.f / std::sqrt(sum(squares) / x.columns + x.eps));
      T* to = static_cast<T*>(x.out) + (batch * x.picked + k) * x.columns;
      each(x.columns, to, [&](int64_t d, int some) { return get(row, d, some) * factor * get(weight, d, some); });
    }
  });
}

// out[index] += rows, in the order of the rows.
template <class T>
int add_rows(const RowsArgs& x) {
  const int64_t parts = 2 * x.threads;  // of the places: each unit adds what falls into its own
  return parallel_for(x.batch * parts, x.threads, [] { return None{}; }, [&](int64_t i, None&) {
    const int64_t batch = i / parts, begin = i % parts * x.rows / parts, end = (i % parts + 1) * x.rows / parts;
    const int64_t* index = x.index + batch * x.index_batch;
    for (int64_t k = 0; k < x.picked; ++k) {
      if (index[k] < begin || index[k] >= end) continue;
      T* to = static_cast<T*>(x.out) + batch * x.x_batch + index[k] * x.x_row;
      const T* row = static_cast<const T*>(x.other) + batch * x.other_batch + k * x.other_row;
      each(x.columns, to, [&](int64_t d, int some) { return get(to, d, some) + get(row, d, some); });
    }
  });
}

// silu(gate) * up, of contiguous tensors.
template <class T>
int swiglu(const T* gate, const T* up, T* out, int64_t count, int64_t threads) {
  const int64_t wide = 1 << 14, chunks = (count + wide - 1) / wide;
  return parallel_for(chunks, threads, [] { return None{}; }, [&](int64_t i, None&) {
    const int64_t from = i * wide, columns = count - from < wide ? count - from : wide;
    each(columns, out + from, [&](int64_t d, int some) {
      const Vec g = get(gate + from, d, some);
      return g / (broadcast(1.f) + exp2(g * broadcast(-1.44269504f))) * get(up + from, d, some);
    });
  });
}

// Of each row of similarities [S, T]: whether its best, each times the scale of its column, beats the best so far.
// The first of equals stays, so columns must come in order. Every `rows_a_scale` rows have scales of their own.
void keep_best(const float* similarity, const float* scales, int64_t rows, int64_t columns, int64_t rows_a_scale,
               int64_t first_column, float* best, int64_t* index, int64_t threads) {
  parallel_for((rows + 63) / 64, threads, [] { return None{}; }, [&](int64_t i, None&) {
    for (int64_t r = i * 64; r < (i + 1) * 64 && r < rows; ++r) {
      const float *row = similarity + r * columns, *scale = scales + r / rows_a_scale * columns;
      Vec high = broadcast(-INFINITY);
      IntVec place = IntVec{} - 1;
      IntVec here;
      for (int n = 0; n < kLanes; ++n) here[n] = n;
      int64_t t = 0;
      for (; t + kLanes <= columns; t += kLanes, here += kLanes) {
        const Vec value = load(row + t) * load(scale + t);
        const IntVec better = value > high;
        high = better ? value : high;
        place = better ? here : place;
      }
      float top = best[r];
      int64_t at = -1;
      for (int n = 0; n < kLanes; ++n)
        if (high[n] > top || (high[n] == top && at >= 0 && place[n] < at)) top = high[n], at = place[n];
      for (; t < columns; ++t)
        if (row[t] * scale[t] > top) top = row[t] * scale[t], at = t;
      if (at >= 0) best[r] = top, index[r] = first_column + at;
    }
  });
}

}  // namespace mminfer

using namespace mminfer;

#define BY_DTYPE(name) (dtype == 0 ? name<float>(*x) : dtype == 1 ? name<BFloat16>(*x) : name<Float16>(*x))

extern "C" int mminfer_merge_rows(const MergeArgs* x, int dtype) { return BY_DTYPE(merge_rows); }
extern "C" int mminfer_gather_rms_norm(const RowsArgs* x, int dtype) { return BY_DTYPE(gather_rms_norm); }
extern "C" int mminfer_add_rows(const RowsArgs* x, int dtype) { return BY_DTYPE(add_rows); }

extern "C" int mminfer_swiglu(const void* gate, const void* up, void* out, int64_t count, int64_t threads, int dtype) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    return swiglu(static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<T*>(out), count, threads);
  };
  return dtype == 0 ? run(0.f) : dtype == 1 ? run(BFloat16{}) : run(Float16{});
}

extern "C" int mminfer_keep_best(const float* similarity, const float* scale, int64_t rows, int64_t columns,
                                 int64_t rows_a_scale, int64_t first_column, float* best, int64_t* index,
                                 int64_t threads) {
  keep_best(similarity, scale, rows, columns, rows_a_scale, first_column, best, index, threads);
  return 0;
}
