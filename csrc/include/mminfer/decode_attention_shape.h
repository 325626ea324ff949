// What the decode attention kernels are told, and how a thread block divides its work: SIZE is the head size rounded up
// to a power of two, ROWS the query rows that share each key.
#pragma once

#include "mminfer/online_softmax.h"

namespace mminfer {

struct DecodeAttentionArguments {
  const void* query;         // [B, H, S, D], strides of B, H, S below
  const void* key;           // [B, G, T, D], strides of B, G, T below
  const void* value;         // [B, G, T, D]
  const i64* starts;         // [B], or null: 0
  const i64* firsts;         // [B, G], of a packed cache, T rows that all heads share: a head's first row; or null
  const i64* lengths;        // [B, G], likewise: its rows
  const float* log_mass;     // [T], of a packed cache, or null
  void* output;              // [B, H, S, D], contiguous
  float* partial;            // [B * H * S, splits, D], unless splits is 1
  OnlineSoftmax* softmaxes;  // [B * H * S, splits], likewise
  i64 query_strides[3];
  i64 key_strides[3];
  i64 value_strides[3];
  int heads, groups, queries, entries, size, splits;
  int split_keys;  // of a packed cache: the rows of a split, of which the last ones of a head may not be there
  double factor;   // of the logits, times log2(e)
};

// The rows of a head in a packed cache. Where not all of them are there, one row, to be multiplied by NaN.
struct Segment {
  int first, length;
  bool there;

  MMINFER_DEVICE Segment(const DecodeAttentionArguments& a, i64 owner) {
    const i64 given = a.firsts[owner], rows = a.lengths[owner];
    there = given >= 0 && rows >= 1 && rows <= static_cast<i64>(a.splits) * a.split_keys && given <= a.entries - rows;
    first = there ? static_cast<int>(given) : 0;
    length = there ? static_cast<int>(rows) : 1;
  }
};

MMINFER_DEVICE constexpr int power_of_two_from(int n) { return n <= 1 ? 1 : 2 * power_of_two_from((n + 1) / 2); }
MMINFER_DEVICE constexpr int larger_of(int a, int b) { return a > b ? a : b; }

template <class T, int SIZE, int ROWS>
struct DecodeShape {
  static constexpr int THREADS = 128;
  static constexpr int WIDTH = Vector<T>::SIZE;
  static constexpr int LANES = SIZE / WIDTH < 32 ? SIZE / WIDTH : 32;  // threads that share a key
  static constexpr int VECTORS = SIZE / WIDTH / LANES;                 // of a key, in one thread
  static constexpr int ELEMENTS = VECTORS * WIDTH;
  static constexpr int STREAMS = THREADS / LANES;  // keys side by side
  static constexpr int KEYS = 4;                   // of a stream at a time: a thread has 8 loads in flight or more
  static constexpr int TILE = KEYS * STREAMS;
  static constexpr int PADDED = power_of_two_from(ROWS);
  static constexpr int LOGITS = KEYS * PADDED;                        // of a stream at a time: [KEYS, PADDED]
  static constexpr int HELD = LOGITS > LANES ? LOGITS / LANES : 1;    // by a thread, once they are added up
  static constexpr int COPIES = LOGITS < LANES ? LANES / LOGITS : 1;  // threads that hold the same one
  static constexpr int KEY_LANES = LANES / KEYS;                      // neighbours whose logits are of one key
  // Shared memory, in floats: while keys are read, the weights and the rescaling of every stream; at the end, the
  // (max, sum) of every stream and of all together, then every stream's sums [STREAMS, ROWS, SIZE].
  static constexpr int WEIGHTS = LOGITS + PADDED;
  static constexpr int STATES = (2 * (STREAMS + 1) * PADDED + 3) / 4 * 4;
  static constexpr int SHARED = larger_of(STREAMS * WEIGHTS, STATES + STREAMS * ROWS * SIZE);
  static_assert(KEYS <= LANES && LANES * VECTORS * WIDTH == SIZE, "SIZE is a power of two from 64 on");
};

}  // namespace mminfer
