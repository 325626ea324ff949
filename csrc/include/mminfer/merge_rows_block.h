// Weighted mean of destination rows and the source rows that go to each, for one thread block.
//
// Sources come sorted by destination, in their own order within one, so every destination is summed by one thread a
// column, always in the same order: no atomics, and each row of `dst` and `src` is read once.
#pragma once

#include "mminfer/block.h"

namespace mminfer {

struct MergeRowsArguments {
  const void* dst;          // [N, T, C], strides of N and T below
  const void* src;          // [N, S, C], strides of N and S below
  const i64* order;         // [N * S]: numbers of the sources, those of the first destination first
  const i64* bounds;        // [N * T + 1]: destination i has order[bounds[i]] .. order[bounds[i + 1] - 1]
  const float* dst_weight;  // [N * T], or null: 1
  const float* src_weight;  // [N * S], or null: 1
  void* merged;             // [N * T, C]
  float* weight;            // [N * T]
  i64 dst_strides[2];
  i64 src_strides[2];
  i64 targets, sources, size;  // T, S, C
  i64 rows;                    // N * T
  i64 lanes;                   // threads of a row: a power of two; a block takes THREADS / lanes rows at once
};

template <class T, bool ALIGNED>
class MergedVector {
 public:
  static constexpr int WIDTH = Vector<T>::SIZE;
  static constexpr int AHEAD = 4;  // sources loaded before the first is added

  MMINFER_DEVICE MergedVector(const MergeRowsArguments& arguments, i64 row, i64 column)
      : a_(arguments), row_(row), column_(column) {}

  MMINFER_DEVICE void run() {
    const Vector<T> own = load_row(a_.dst, a_.dst_strides, a_.targets, row_);
    weight_ = a_.dst_weight ? a_.dst_weight[row_] : 1.0f;
    MMINFER_UNROLL
    for (int i = 0; i < WIDTH; ++i) sum_[i] = element(own, i) * weight_;
    const i64 end = a_.bounds[row_ + 1];
    for (i64 first = a_.bounds[row_]; first < end; first += AHEAD) add_sources(first, end);
    MMINFER_UNROLL
    for (int i = 0; i < WIDTH; ++i) sum_[i] /= weight_;
    store<ALIGNED>(static_cast<T*>(a_.merged) + row_ * a_.size + column_, sum_, a_.size - column_);
    if (column_ == 0) a_.weight[row_] = weight_;
  }

 private:
  MMINFER_DEVICE Vector<T> load_row(const void* base, const i64 (&strides)[2], i64 rows, i64 number) {
    const i64 row = number / rows * strides[0] + number % rows * strides[1];
    return load<ALIGNED>(static_cast<const T*>(base) + row + column_, a_.size - column_);
  }

  MMINFER_DEVICE void add_sources(i64 first, i64 end) {
    Vector<T> rows[AHEAD];
    float weights[AHEAD];
    MMINFER_UNROLL
    for (int i = 0; i < AHEAD; ++i) {
      if (first + i >= end) continue;
      const i64 number = a_.order[first + i];
      rows[i] = load_row(a_.src, a_.src_strides, a_.sources, number);
      weights[i] = a_.src_weight ? a_.src_weight[number] : 1.0f;
    }
    MMINFER_UNROLL
    for (int i = 0; i < AHEAD; ++i) {
      if (first + i >= end) continue;
      weight_ += weights[i];
      MMINFER_UNROLL
      for (int e = 0; e < WIDTH; ++e) sum_[e] += element(rows[i], e) * weights[i];
    }
  }

  const MergeRowsArguments& a_;
  const i64 row_, column_;
  float weight_, sum_[WIDTH];
};

// Block x takes THREADS / lanes destinations, block y some of their columns.
template <class T, bool ALIGNED, int THREADS, class Block>
MMINFER_DEVICE void merge_rows(const MergeRowsArguments& a, Block& block) {
  block.each([&](int thread) {
    const int lanes = static_cast<int>(a.lanes);
    const i64 row = block.x() * (THREADS / lanes) + thread / lanes;
    const i64 column = (block.y() * lanes + thread % lanes) * Vector<T>::SIZE;
    if (row < a.rows && column < a.size) MergedVector<T, ALIGNED>(a, row, column).run();
  });
}

}  // namespace mminfer
