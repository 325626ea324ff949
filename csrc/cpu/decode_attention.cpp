// Decode attention over padded and packed caches: parts of all their keys over threads, then their combination.
#include "mminfer/cpu/decode_attention.h"

#include <vector>

#include "mminfer/cpu/attention.h"
#include "mminfer/cpu/parallel.h"
#include "mminfer/cpu/parts.h"

namespace mminfer {

constexpr int64_t kLeastRows = 512;  // of a part: fewer are not worth a second pass over the partial sums
constexpr int64_t kPartsAThread = 4;
constexpr int64_t kSerialElements = 1 << 17;  // of all keys: starting threads would take longer

// Each head of a sequence has a segment of rows of keys and values [B, G, T, D]: from the sequence's start on, or what
// it is told. Of a packed cache all heads are views of the same rows.
struct DecodeArgs {
  const void *q, *k, *v;
  void* out;
  const int64_t* starts;           // [B]; null: 0
  const int64_t *first, *lengths;  // [B, G]; null: from the start to T
  const float* log_mass;           // [T]; null: 0
  int64_t batch, heads, groups, queries, entries, head_dim;
  Rows3 q_stride, k_stride, v_stride, out_stride;
  int64_t threads;
  float scale;

  int64_t segments() const { return batch * groups; }
  int64_t rows() const { return heads / groups * queries; }  // of queries, of a segment
  int64_t first_of(int64_t segment) const {
    if (first) return first[segment];
    const int64_t given = starts ? starts[segment / groups] : 0, last = entries - queries;
    return given < 0 ? 0 : given > last ? last : given;
  }
  int64_t length_of(int64_t segment) const { return lengths ? lengths[segment] : entries - first_of(segment); }

  // The i-th row of queries or outputs of a segment.
  template <class T>
  T* row(T* base, const Rows3& stride, int64_t segment, int64_t i) const {
    const int64_t head = segment % groups * (heads / groups) + i / queries;
    return base + segment / groups * stride.batch + head * stride.head + i % queries * stride.row;
  }
};

struct DecodeScratch {
  Buffer q;
  std::vector<int64_t> visible;
  DecodeScratch(int64_t rows, int64_t size) : q(rows * padded(size)), visible(rows) {}
};

// What is found out about a segment's rows [from, to), into `partial`.
template <class T>
void decode_piece(const DecodeArgs& x, int64_t segment, int64_t from, int64_t to, Softmax partial, DecodeScratch& s) {
  const int64_t rows = x.rows(), width = padded(x.head_dim), first = x.first_of(segment), length = x.length_of(segment);
  std::memset(partial.out, 0, rows * width * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) partial.top[r] = -1e30f, partial.total[r] = 0;
  const Vec scale = broadcast(x.scale * kLog2e);
  for (int64_t r = 0; r < rows; ++r) {
    const T* q = x.row(static_cast<const T*>(x.q), x.q_stride, segment, r);
    for (int64_t d = 0; d < width; d += kLanes) store(s.q.data + r * width + d, load_row(q, d, x.head_dim) * scale);
  }
  const int64_t batch = segment / x.groups, group = segment % x.groups;
  const T* k = static_cast<const T*>(x.k) + batch * x.k_stride.batch + group * x.k_stride.head + first * x.k_stride.row;
  const T* v = static_cast<const T*>(x.v) + batch * x.v_stride.batch + group * x.v_stride.head + first * x.v_stride.row;
  for (int64_t j = from; j < to; j += kStretchKeys) {
    for (int64_t r = 0; r < rows; ++r) s.visible[r] = length - x.queries + r % x.queries + 1 - j;
    take_in_rows<T>(rows, s.q.data, k + j * x.k_stride.row, x.k_stride.row, v + j * x.v_stride.row, x.v_stride.row,
                    x.log_mass ? x.log_mass + first + j : nullptr, std::min<int64_t>(kStretchKeys, to - j), x.head_dim,
                    s.visible.data(), partial);
  }
}

template <class T, class PartialOf>
void combine(const DecodeArgs& x, int64_t segment, int64_t first, int64_t last, const PartialOf& partial) {
  const int64_t rows = x.rows(), width = padded(x.head_dim);
  for (int64_t r = 0; r < rows; ++r) {
    float top = -INFINITY, total = 0;
    for (int64_t i = first; i <= last; ++i) top = std::fmax(top, partial(i).top[r]);
    const auto weight = [&](int64_t i) { return std::exp2(partial(i).top[r] - top); };
    for (int64_t i = first; i <= last; ++i) total += weight(i) * partial(i).total[r];
    T* out = x.row(static_cast<T*>(x.out), x.out_stride, segment, r);
    for (int64_t d = 0; d < width; d += kLanes) {
      Vec sum_of = zero();
      for (int64_t i = first; i <= last; ++i)
        sum_of += load(partial(i).out + r * width + d) * broadcast(weight(i) / total);
      store_some(out + d, sum_of, x.head_dim - d < kLanes ? (int)(x.head_dim - d) : kLanes);
    }
  }
}

template <class T>
int decode_attention(const DecodeArgs& x) {
  const int64_t rows = x.rows(), width = padded(x.head_dim), size = whole_lines(rows * (width + 2));
  std::vector<int64_t> ends(x.segments() + 1);
  for (int64_t i = 0; i < x.segments(); ++i) ends[i + 1] = ends[i] + x.length_of(i);
  const int64_t threads = ends.back() * x.head_dim <= kSerialElements ? 1 : x.threads;
  const int64_t wanted = threads == 1 ? 1 : std::min(threads * kPartsAThread, ends.back() / kLeastRows);
  const Parts parts(ends.data(), x.segments(), std::max<int64_t>(1, wanted));
  const Buffer memory(parts.slots() * size);
  const auto partial = [&](int64_t slot) {
    float* out = memory.data + slot * size;
    return Softmax{out, out + rows * width, out + rows * (width + 1)};
  };
  const int failed = parallel_for(
      parts.count(), threads, [&] { return DecodeScratch(rows, x.head_dim); },
      [&](int64_t part, DecodeScratch& s) {
        parts.each(part, [&](int64_t segment, int64_t from, int64_t to, int64_t slot) {
          decode_piece<T>(x, segment, from, to, partial(slot), s);
        });
      });
  for (int64_t i = 0; i < x.segments() && !failed; ++i)
    combine<T>(x, i, parts.first_slot(i), parts.last_slot(i), partial);
  return failed;
}

}  // namespace mminfer

using namespace mminfer;

extern "C" int mminfer_decode_attention(const DecodeArgs* x, int dtype) {
  try {
    return dtype == 0   ? decode_attention<float>(*x)
           : dtype == 1 ? decode_attention<BFloat16>(*x)
                        : decode_attention<Float16>(*x);
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
