// Decode attention over padded caches: stretches of keys over threads, then their combination.
#include "mminfer/cpu/decode_attention.h"

#include "mminfer/cpu/attention.h"
#include "mminfer/cpu/parallel.h"

namespace mminfer {

struct DecodeArgs {
  const void *q, *k, *v;
  void* out;
  const int64_t* starts;  // [B]; null: 0
  float* partial;         // [B, G, pieces, rows, padded D + 2]
  int64_t batch, heads, groups, queries, entries, head_dim;
  Rows3 q_stride, k_stride, v_stride, out_stride;
  int64_t pieces, piece_keys, threads;
  float scale;
};

struct DecodeScratch {
  Buffer q, out, top, total;
  int64_t* visible;
  Buffer visible_memory;
  DecodeScratch(int64_t rows, int64_t size)
      : q(rows * padded(size)), out(rows * padded(size)), top(rows), total(rows), visible_memory(2 * rows) {
    visible = reinterpret_cast<int64_t*>(visible_memory.data);
  }
};

template <class T>
void decode_piece(const DecodeArgs& x, int64_t batch, int64_t group, int64_t piece, DecodeScratch& s) {
  const int64_t repeat = x.heads / x.groups, rows = repeat * x.queries, width = padded(x.head_dim);
  const int64_t given = x.starts ? x.starts[batch] : 0, last = x.entries - x.queries;
  const int64_t start = (given < 0 ? 0 : given > last ? last : given) + piece * x.piece_keys;
  const int64_t end = start + x.piece_keys < x.entries ? start + x.piece_keys : x.entries;
  float* partial = x.partial + ((batch * x.groups + group) * x.pieces + piece) * rows * (width + 2);
  Softmax state{partial, partial + rows * width, partial + rows * (width + 1)};
  std::memset(partial, 0, rows * width * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) state.top[r] = -1e30f, state.total[r] = 0;
  if (start >= end) return;
  const Vec scale = broadcast(x.scale * 1.44269504f);
  for (int64_t r = 0; r < rows; ++r) {
    const T* q = static_cast<const T*>(x.q) + batch * x.q_stride.batch +
                 (group * repeat + r / x.queries) * x.q_stride.head + r % x.queries * x.q_stride.row;
    for (int64_t d = 0; d < width; d += kLanes) store(s.q.data + r * width + d, load_row(q, d, x.head_dim) * scale);
  }
  const T* k = static_cast<const T*>(x.k) + batch * x.k_stride.batch + group * x.k_stride.head;
  const T* v = static_cast<const T*>(x.v) + batch * x.v_stride.batch + group * x.v_stride.head;
  for (int64_t j = start; j < end; j += kStretchKeys) {
    const int64_t count = end - j < kStretchKeys ? end - j : kStretchKeys;
    for (int64_t r = 0; r < rows; ++r) s.visible[r] = x.entries - x.queries + r % x.queries + 1 - j;
    take_in_rows<T>(rows, s.q.data, k + j * x.k_stride.row, x.k_stride.row, v + j * x.v_stride.row, x.v_stride.row,
                    count, x.head_dim, s.visible, state);
  }
}

template <class T>
void combine(const DecodeArgs& x, int64_t batch, int64_t group) {
  const int64_t repeat = x.heads / x.groups, rows = repeat * x.queries, width = padded(x.head_dim);
  const float* partial = x.partial + (batch * x.groups + group) * x.pieces * rows * (width + 2);
  for (int64_t r = 0; r < rows; ++r) {
    float top = -INFINITY, total = 0;
    const auto piece = [&](int64_t i) { return partial + i * rows * (width + 2); };
    for (int64_t i = 0; i < x.pieces; ++i) top = std::fmax(top, piece(i)[rows * width + r]);
    const auto weight = [&](int64_t i) { return std::exp2(piece(i)[rows * width + r] - top); };
    for (int64_t i = 0; i < x.pieces; ++i) total += weight(i) * piece(i)[rows * (width + 1) + r];
    T* out = static_cast<T*>(x.out) + batch * x.out_stride.batch +
             (group * repeat + r / x.queries) * x.out_stride.head + r % x.queries * x.out_stride.row;
    for (int64_t d = 0; d < width; d += kLanes) {
      Vec sum_of = zero();
      for (int64_t i = 0; i < x.pieces; ++i) sum_of += load(piece(i) + r * width + d) * broadcast(weight(i) / total);
      store_some(out + d, sum_of, x.head_dim - d < kLanes ? (int)(x.head_dim - d) : kLanes);
    }
  }
}

template <class T>
int decode_attention(const DecodeArgs& x) {
  const int64_t rows = x.heads / x.groups * x.queries, owners = x.batch * x.groups;
  const int failed = parallel_for(
      owners * x.pieces, x.threads, [&] { return DecodeScratch(rows, x.head_dim); },
      [&](int64_t i, DecodeScratch& s) {
        const int64_t owner = i / x.pieces;
        decode_piece<T>(x, owner / x.groups, owner % x.groups, i % x.pieces, s);
      });
  if (!failed)
    for (int64_t i = 0; i < owners; ++i) combine<T>(x, i / x.groups, i % x.groups);
  return failed;
}

}  // namespace mminfer

using namespace mminfer;

extern "C" int mminfer_decode_attention(const DecodeArgs* x, int dtype) {
  return dtype == 0   ? decode_attention<float>(*x)
         : dtype == 1 ? decode_attention<BFloat16>(*x)
                      : decode_attention<Float16>(*x);
}
