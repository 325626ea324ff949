// Attention of a few query rows over a range of cached keys, for one thread block; and the sum of several ranges.
// PACKED: of a packed cache, in which heads have lengths of their own, and for one new token.
//
// All query heads of a group and all their new tokens are the rows of one small matrix, so that a key or value is
// loaded once for up to ROWS of them. LANES threads share a key, 16 bytes each; the block works on STREAMS keys side by
// side, KEYS of them one after the other, straight from global memory into registers. Each stream is a softmax of its
// own that waits for no other before the end, so warps run freely and loads never stop.
//
// A thread's logits are sums over its own 16 bytes. They are added across the LANES threads by halving: every exchange
// gives away half of the values and keeps the sum of the other half, so each logit ends in one thread (COPIES where
// there are fewer logits than threads), which takes its exponential once and hands it round through shared memory.
#pragma once

#include "mminfer/block.h"
#include "mminfer/decode_attention_shape.h"

namespace mminfer {

template <class T, int SIZE, int ROWS, bool ALIGNED, bool PACKED, class Block>
class DecodeAttention {
  using Shape = DecodeShape<T, SIZE, ROWS>;
  static constexpr int WIDTH = Shape::WIDTH, LANES = Shape::LANES, VECTORS = Shape::VECTORS, KEYS = Shape::KEYS,
                       STREAMS = Shape::STREAMS, PADDED = Shape::PADDED, LOGITS = Shape::LOGITS, HELD = Shape::HELD,
                       KEY_LANES = Shape::KEY_LANES, READ = PADDED < 4 ? PADDED : 4;
  template <class V>
  using PerThread = typename Block::template PerThread<V>;

 public:
  MMINFER_DEVICE DecodeAttention(const DecodeAttentionArguments& arguments, Block& block) : a_(arguments), b_(block) {
    rows_ = a_.heads / a_.groups * queries();
    const int row_blocks = (rows_ + ROWS - 1) / ROWS;
    group_ = static_cast<int>(b_.y()) / row_blocks;
    first_row_ = static_cast<int>(b_.y()) % row_blocks * ROWS;
    if constexpr (PACKED) {
      const Segment rows(a_, b_.z() * a_.groups + group_);
      const i64 before = b_.x() * a_.split_keys;
      begin_ = rows.first + (before < rows.length ? static_cast<int>(before) : rows.length);
      end_ = rows.first + rows.length;
      if (a_.split_keys < end_ - begin_) end_ = begin_ + a_.split_keys;
      factor_ = rows.there ? static_cast<float>(a_.factor) : not_a_number();
    } else {
      const int start = a_.starts ? static_cast<int>(a_.starts[b_.z()]) : 0;
      const int part = (a_.entries - start + a_.splits - 1) / a_.splits;
      begin_ = start + static_cast<int>(b_.x()) * part;
      end_ = begin_ + part < a_.entries ? begin_ + part : a_.entries;
      factor_ = static_cast<float>(a_.factor);
    }
  }

  MMINFER_DEVICE void run() {
    if (PACKED && begin_ == end_) return;  // behind the head's last row: nobody reads what this block would write
    start();
    load(key_, key_at_, a_.key_strides[2], begin_);
    load(value_, value_at_, a_.value_strides[2], begin_);
    for (int first = begin_; first < end_; first += Shape::TILE) {
      multiply_keys();
      load(key_, key_at_, a_.key_strides[2], first + Shape::TILE);
      add_up_logits<LOGITS, LANES / 2>();
      weigh(first);
      add_values();
      load(value_, value_at_, a_.value_strides[2], first + Shape::TILE);
    }
    finish();
  }

 private:
  using Row = Vector<T>;

  MMINFER_DEVICE int queries() const { return PACKED ? 1 : a_.queries; }

  static MMINFER_DEVICE int lane(int thread) { return thread % LANES; }
  static MMINFER_DEVICE int stream(int thread) { return thread / LANES; }
  static MMINFER_DEVICE int column(int thread, int vector) { return (vector * LANES + lane(thread)) * WIDTH; }
  // The row of the thread's i-th logit after they were added up.
  static MMINFER_DEVICE int row_of(int thread, int i) { return (lane(thread) / Shape::COPIES * HELD + i) % PADDED; }

  MMINFER_DEVICE void start() {
    b_.each([&](int thread) {
      const i64 first = begin_ + stream(thread);
      key_at_[thread] = row(a_.key, a_.key_strides, b_.z(), group_, first) + column(thread, 0);
      value_at_[thread] = row(a_.value, a_.value_strides, b_.z(), group_, first) + column(thread, 0);
      MMINFER_UNROLL
      for (int r = 0; r < ROWS; ++r) load_query(thread, r);
      MMINFER_UNROLL
      for (int i = 0; i < HELD; ++i) softmax_[thread].at[i] = OnlineSoftmax::empty();
    });
  }

  static MMINFER_DEVICE const T* row(const void* base, const i64 (&strides)[3], i64 x, i64 y, i64 z) {
    return static_cast<const T*>(base) + (x * strides[0] + y * strides[1] + z * strides[2]);
  }

  MMINFER_DEVICE void load_query(int thread, int r) {
    const int number = first_row_ + r, head = group_ * (a_.heads / a_.groups) + number / queries();
    const T* from = row(a_.query, a_.query_strides, b_.z(), head, number % queries());
    MMINFER_UNROLL
    for (int j = 0; j < VECTORS; ++j) {
      const int at = column(thread, j);
      const Row loaded = mminfer::load<ALIGNED>(from + at, number < rows_ ? a_.size - at : 0);
      MMINFER_UNROLL
      for (int i = 0; i < WIDTH; ++i) {
        query_[thread].at[r][j * WIDTH + i] = element(loaded, i) * factor_;
        sum_[thread].at[r][j * WIDTH + i] = 0;
      }
    }
  }

  // The rows of the tile that begins at `first`, zeros beyond the end; `at` walks on to the next tile.
  template <class Rows, class At>
  MMINFER_DEVICE void load(Rows& rows, At& at, i64 stride, int first) {
    b_.each([&](int thread) {
      MMINFER_UNROLL
      for (int u = 0; u < KEYS; ++u) {
        const bool there = first + u * STREAMS + stream(thread) < end_;
        MMINFER_UNROLL
        for (int j = 0; j < VECTORS; ++j)
          rows[thread].at[u][j] = mminfer::load<ALIGNED>(at[thread] + j * LANES * WIDTH,
                                                         there ? a_.size - column(thread, j) : 0);
        at[thread] += STREAMS * stride;
      }
    });
  }

  MMINFER_DEVICE void multiply_keys() {
    b_.each([&](int thread) {
      auto& logit = logit_[thread].at;
      MMINFER_UNROLL
      for (int i = 0; i < LOGITS; ++i) logit[i] = 0;
      MMINFER_UNROLL
      for (int u = 0; u < KEYS; ++u)
        MMINFER_UNROLL
        for (int e = 0; e < Shape::ELEMENTS; ++e) {
          const float key = element(key_[thread].at[u][e / WIDTH], e % WIDTH);
          MMINFER_UNROLL
          for (int r = 0; r < ROWS; ++r) logit[u * PADDED + r] += query_[thread].at[r][e] * key;
        }
    });
  }

  // COUNT logits a thread, to be added over threads that differ in bits OFFSET, OFFSET / 2, .. 1.
  template <int COUNT, int OFFSET>
  MMINFER_DEVICE void add_up_logits() {
    if constexpr (OFFSET > 0) {
      constexpr int KEPT = COUNT > 1 ? COUNT / 2 : 1;
      b_.each([&](int thread) {
        auto& logit = logit_[thread].at;
        const bool upper = thread & OFFSET;
        MMINFER_UNROLL
        for (int i = 0; i < KEPT; ++i) {
          const float low = logit[i], high = COUNT > 1 ? logit[KEPT + i] : low;
          logit[i] = upper ? high : low;
          logit[KEPT + i] = upper ? low : high;
        }
      });
      b_.template exchange<KEPT, KEPT, OFFSET>(logit_);
      b_.each([&](int thread) {
        MMINFER_UNROLL
        for (int i = 0; i < KEPT; ++i) logit_[thread].at[i] += logit_[thread].at[KEPT + i];
      });
      add_up_logits<KEPT, OFFSET / 2>();
    }
  }

  // Logits become weights relative to the stream's new maximum; both and the rescaling of earlier sums are shared.
  MMINFER_DEVICE void weigh(int first) {
    b_.each([&](int thread) {
      const int key = first + lane(thread) / KEY_LANES * STREAMS + stream(thread);
      MMINFER_UNROLL
      for (int i = 0; i < HELD; ++i) {
        const int last = a_.entries - queries() + (first_row_ + row_of(thread, i)) % queries();
        if (PACKED && a_.log_mass && key < end_) logit_[thread].at[i] += a_.log_mass[key] * 1.44269504f;  // log2(e)
        if (key >= end_ || key > last) logit_[thread].at[i] = minus_infinity();
        peak_[thread].at[i] = logit_[thread].at[i];
      }
    });
    over_keys<LANES / 2>(peak_, [](float a, float b) { return larger(a, b); });
    b_.each([&](int thread) {
      grew_[thread] = false;
      MMINFER_UNROLL
      for (int i = 0; i < HELD; ++i) {
        OnlineSoftmax& state = softmax_[thread].at[i];
        const float max = larger(state.max, peak_[thread].at[i]), correction = rescale(state.max, max);
        grew_[thread] = grew_[thread] || max > state.max;
        const float weight = rescale(logit_[thread].at[i], max);
        state = {max, state.sum * correction + weight};
        share(thread, i, weight, correction);
      }
    });
    b_.any_in_warp(grew_);
    b_.sync_warp();
  }

  MMINFER_DEVICE void share(int thread, int i, float weight, float correction) {
    if (lane(thread) % Shape::COPIES) return;
    const int base = stream(thread) * Shape::WEIGHTS, key = lane(thread) / KEY_LANES, row = row_of(thread, i);
    b_.template put<1>(thread, base + key * PADDED + row, {weight});
    if (key == 0) b_.template put<1>(thread, base + LOGITS + row, {correction});
  }

  // Element 0 .. HELD - 1 of every thread's array, combined over the threads that hold other keys of the same row.
  template <int OFFSET, class Values, class Combine>
  MMINFER_DEVICE void over_keys(Values& values, Combine with) {
    if constexpr (OFFSET >= KEY_LANES) {
      b_.each([&](int thread) {
        MMINFER_UNROLL
        for (int i = 0; i < HELD; ++i) values[thread].at[HELD + i] = values[thread].at[i];
      });
      b_.template exchange<HELD, HELD, OFFSET>(values);
      b_.each([&](int thread) {
        MMINFER_UNROLL
        for (int i = 0; i < HELD; ++i) values[thread].at[i] = with(values[thread].at[i], values[thread].at[HELD + i]);
      });
      over_keys<OFFSET / 2>(values, with);
    }
  }

  // A stream's [.., PADDED] shared floats from `at` on, a few rows an access; f(row, value).
  template <class Use>
  MMINFER_DEVICE void each_row(int thread, int at, Use use) {
    MMINFER_UNROLL
    for (int r = 0; r < ROWS; r += READ) {
      const Floats<READ> read = b_.template get<READ>(thread, at + r);
      MMINFER_UNROLL
      for (int i = 0; i < READ; ++i)
        if (r + i < ROWS) use(r + i, read.at[i]);
    }
  }

  MMINFER_DEVICE void add_values() {
    b_.each([&](int thread) {
      auto& sum = sum_[thread].at;
      const int base = stream(thread) * Shape::WEIGHTS;
      if (grew_[thread])  // seldom, after the first tiles
        each_row(thread, base + LOGITS, [&](int r, float correction) {
          MMINFER_UNROLL
          for (int e = 0; e < Shape::ELEMENTS; ++e) sum[r][e] *= correction;
        });
      MMINFER_UNROLL
      for (int u = 0; u < KEYS; ++u)
        each_row(thread, base + u * PADDED, [&](int r, float weight) {
          MMINFER_UNROLL
          for (int e = 0; e < Shape::ELEMENTS; ++e)
            sum[r][e] += weight * element(value_[thread].at[u][e / WIDTH], e % WIDTH);
        });
    });
    b_.sync_warp();
  }

  MMINFER_DEVICE void finish() {
    b_.each([&](int thread) {
      MMINFER_UNROLL
      for (int i = 0; i < HELD; ++i) peak_[thread].at[i] = softmax_[thread].at[i].sum;
    });
    over_keys<LANES / 2>(peak_, [](float a, float b) { return a + b; });
    b_.sync();
    b_.each([&](int thread) {
      MMINFER_UNROLL
      for (int i = 0; i < HELD; ++i)
        if (lane(thread) < KEY_LANES && lane(thread) % Shape::COPIES == 0)
          put_state(thread, stream(thread), row_of(thread, i), {softmax_[thread].at[i].max, peak_[thread].at[i]});
    });
    b_.sync();
    b_.each([&](int thread) {
      if (thread >= ROWS) return;
      OnlineSoftmax total = OnlineSoftmax::empty();
      for (int s = 0; s < STREAMS; ++s) total = combine(total, state(thread, s, thread));
      put_state(thread, STREAMS, thread, total);
    });
    b_.sync();
    b_.each([&](int thread) { put_sums(thread); });
    b_.sync();
    b_.each([&](int thread) { write(thread); });
  }

  MMINFER_DEVICE OnlineSoftmax state(int thread, int stream, int r) {
    const Floats<2> read = b_.template get<2>(thread, 2 * (stream * PADDED + r));
    return {read.at[0], read.at[1]};
  }

  MMINFER_DEVICE void put_state(int thread, int stream, int r, OnlineSoftmax state) {
    b_.template put<2>(thread, 2 * (stream * PADDED + r), {state.max, state.sum});
  }

  // The thread's sums, relative to the maximum of all streams, into [STREAMS, ROWS, SIZE].
  MMINFER_DEVICE void put_sums(int thread) {
    MMINFER_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const float own = rescale(state(thread, stream(thread), r).max, state(thread, STREAMS, r).max);
      const auto& sum = sum_[thread].at[r];
      const int base = Shape::STATES + (stream(thread) * ROWS + r) * SIZE;
      MMINFER_UNROLL
      for (int e = 0; e < Shape::ELEMENTS; e += 4)
        b_.template put<4>(thread, base + column(thread, e / WIDTH) + e % WIDTH,
                           {sum[e] * own, sum[e + 1] * own, sum[e + 2] * own, sum[e + 3] * own});
    }
  }

  MMINFER_DEVICE void write(int thread) {
    const i64 first = (b_.z() * a_.groups + group_) * rows_ + first_row_;  // of the rows in [B * H * S]
    const int rows = rows_ - first_row_ < ROWS ? rows_ - first_row_ : ROWS;
#pragma unroll 1
    for (int i = thread; i < rows * SIZE; i += Shape::THREADS) {
      const int r = i / SIZE, column = i % SIZE;
      if (column >= a_.size) continue;
      float sum = 0;
      MMINFER_UNROLL
      for (int s = 0; s < STREAMS; ++s)
        sum += b_.template get<1>(thread, Shape::STATES + s * ROWS * SIZE + i).at[0];
      const OnlineSoftmax total = state(thread, STREAMS, r);
      const i64 part = (first + r) * a_.splits + b_.x();
      if (a_.splits == 1) {
        from_float(sum * normaliser(total), static_cast<T*>(a_.output)[(first + r) * a_.size + column]);
      } else {
        a_.partial[part * a_.size + column] = sum;
        if (column == 0) a_.softmaxes[part] = total;
      }
    }
  }

  const DecodeAttentionArguments& a_;
  Block& b_;
  int rows_, group_, first_row_, begin_, end_;
  float factor_;
  PerThread<const T*> key_at_, value_at_;
  PerThread<Array<Row[VECTORS], KEYS>> key_, value_;
  PerThread<Array<float[Shape::ELEMENTS], ROWS>> query_, sum_;
  PerThread<Array<float, LOGITS>> logit_;
  PerThread<Array<float, 2 * HELD>> peak_;
  PerThread<Array<OnlineSoftmax, HELD>> softmax_;
  PerThread<bool> grew_;
};

// One row of the output from its splits: block x is the row's number in [B * H * S].
template <class T, int THREADS, class Block>
MMINFER_DEVICE void combine_splits(const DecodeAttentionArguments& a, Block& block) {
  int splits = a.splits;
  if (a.lengths) {
    const Segment rows(a, block.x() / (a.heads / a.groups * a.queries));
    splits = (rows.length + a.split_keys - 1) / a.split_keys;
  }
  block.each([&](int thread) {
    const OnlineSoftmax* states = a.softmaxes + block.x() * a.splits;
    float max = minus_infinity();
    for (int s = 0; s < splits; ++s) max = larger(max, states[s].max);
    for (int column = thread; column < a.size; column += THREADS) {
      const float* partial = a.partial + block.x() * a.splits * a.size + column;
      OnlineSoftmax total = {max, 0.0f};
      float sum = 0;
#pragma unroll 4
      for (int s = 0; s < splits; ++s) {
        const float weight = rescale(states[s].max, max);
        total.sum += weight * states[s].sum;
        sum += weight * partial[s * a.size];
      }
      from_float(sum * normaliser(total), static_cast<T*>(a.output)[block.x() * a.size + column]);
    }
  });
}

}  // namespace mminfer
