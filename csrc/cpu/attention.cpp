// Prompt attention, the masses and peaks of its columns, and power iteration: plain C entry points.
#include "mminfer/cpu/attention.h"

#include "mminfer/cpu/parallel.h"

namespace mminfer {

// Slots of rows of one group, queries in turn: kLanes queries of one head each, heads in turn; or with `mixed` lanes
// the rows of all heads one behind the other.
template <int NV>
Block<NV> block_at(const AttentionArgs& x, bool mixed, int64_t slot, int64_t heads, int64_t first_head, int64_t keys) {
  Block<NV> block;
  block.keys = keys;
  for (int n = 0; n < NV; ++n, ++slot) {
    const int64_t row = mixed ? slot * kLanes : slot / heads * kLanes, rows = mixed ? x.queries * heads : x.queries;
    block.count[n] = rows - row < kLanes ? (int)(rows - row) : kLanes;
    int64_t query = mixed ? row / heads : row, head = mixed ? row % heads : slot % heads;
    for (int i = 0; i < block.count[n]; ++i) {
      block.query[n][i] = query;
      block.head[n][i] = first_head + head;
      if (!mixed) ++query;
      else if (++head == heads) head = 0, ++query;
    }
  }
  block.find_keys(x);
  return block;
}

// What a power of each lane counts: its query's vote over the sum of its powers; of lanes without a query nothing.
template <int NV>
void shares(const AttentionArgs& x, const Block<NV>& block, int64_t batch, const Scratch& s, Vec* share) {
  for (int n = 0; n < NV; ++n) {
    float votes[kLanes] = {};
    for (int i = 0; i < block.count[n]; ++i)
      votes[i] = x.weights ? *at(x.weights, x.weight_stride, batch, block.head[n][i], block.query[n][i]) : 1.f;
    share[n] = load(votes) / s.total[n];
  }
}

// Adds the votes of a block to its heads' `mass` [H, N], or raises its group's `peak` [counted].
template <int NV>
void score(const AttentionArgs& x, const Block<NV>& block, int64_t batch, float* mass, float* peak, const Scratch& s) {
  constexpr int R = NV * kLanes;
  Vec share[NV], factor[NV];
  shares<NV>(x, block, batch, s, share);
  const int64_t end = block.end < x.counted ? block.end : x.counted;
  for (int64_t start = 0, tile = 0; start < end; start += kTileKeys, ++tile) {
    const int64_t count = end - start < kTileKeys ? end - start : kTileKeys;
    const float* p = s.probabilities.data + start * R;
    for (int n = 0; n < NV; ++n) factor[n] = share[n] * exp2(load(s.tile_max.data + tile * R + n * kLanes) - s.top[n]);
    if (peak) fold_columns<Largest, NV>(p, R, count, factor, peak + start);
    else
      for (int n = 0; n < NV; ++n)
        fold_columns<Sum, 1>(p + n * kLanes, R, count, factor + n, mass + block.head[n][0] * x.keys + start);
  }
}

template <int NV, class T, bool WithValues, bool WithScores>
void run_block(const AttentionArgs& x, bool mixed, int64_t part, int64_t batch, int64_t group, int64_t slot,
               Scratch& s) {
  const int64_t repeat = x.heads / x.groups;
  const KeyHead<T> head(x, batch, group);
  const Block<NV> block = block_at<NV>(x, mixed, slot, repeat, group * repeat, head.count);
  attend<NV, T, WithValues, WithScores>(x, block, at(static_cast<const T*>(x.q), x.q_stride, batch, 0), head, s);
  if (WithValues) {
    Vec factor[NV];
    for (int n = 0; n < NV; ++n) factor[n] = broadcast(1.f) / s.total[n];
    block.store_rows(x, s.values.data, factor, static_cast<T*>(x.out) + batch * x.out_stride.batch);
  }
  if (WithScores) {
    const int64_t owner = part * x.batch + batch;
    float* mass = x.mass ? x.mass + owner * x.heads * x.keys : nullptr;
    float* peak = x.peak ? x.peak + (owner * x.groups + group) * x.counted : nullptr;
    score<NV>(x, block, batch, mass, peak, s);
  }
}

// Units of work: every `parts`-th block of a group, heaviest first. Each has columns of its own, so that the result
// does not depend on who finishes when.
template <class T, bool WithValues, bool WithScores>
int attention(const AttentionArgs& x) {
  const int64_t repeat = x.heads / x.groups, apart = (x.queries + kLanes - 1) / kLanes * repeat;
  const int64_t together = (x.queries * repeat + kLanes - 1) / kLanes;
  const bool mixed = !x.mass && together * 8 <= apart * 7;  // else its ragged ends cost what it saves
  const int64_t slots = mixed ? together : apart;
  const int64_t blocks = (slots + kSlots - 1) / kSlots;
  const auto scratch = [&] { return Scratch(x, WithScores); };
  const auto unit = [&](int64_t i, Scratch& s) {
    const int64_t part = i / (x.batch * x.groups), owner = i % (x.batch * x.groups);
    const int64_t batch = owner / x.groups, group = owner % x.groups;
    for (int64_t block = blocks - 1 - part; block >= 0; block -= x.parts) {
      const int64_t slot = block * kSlots;
      if (slots - slot >= 3) run_block<3, T, WithValues, WithScores>(x, mixed, part, batch, group, slot, s);
      else if (slots - slot == 2) run_block<2, T, WithValues, WithScores>(x, mixed, part, batch, group, slot, s);
      else run_block<1, T, WithValues, WithScores>(x, mixed, part, batch, group, slot, s);
    }
  };
  return parallel_for(x.parts * x.batch * x.groups, x.threads, scratch, unit);
}

// Columns that the votes of a block's own rows go to: x_1 .. x_{T-1} of its rows, from those of later rows.
template <int NV>
void settle(const AttentionArgs& x, const Block<NV>& block, const float* votes, const Vec* divided, Scratch& s,
            float* own) {
  constexpr int R = NV * kLanes;
  for (int n = 0; n < NV; ++n)
    for (int i = 0; i < kLanes; ++i) own[n * kLanes + i] = i < block.count[n] ? 1.f / x.keys : 0.f;
  for (int64_t t = 1; t < x.iterations; ++t) {
    const float* before = own + (t - 1) * R;
    float* now = own + t * R;
    for (int n = 0; n < NV; ++n)
      for (int i = 0; i < kLanes; ++i) {
        if (i >= block.count[n]) { now[n * kLanes + i] = 0; continue; }
        const int64_t key = block.place(x, block.query[n][i]), place = key - block.begin;
        Vec total = zero();
        for (int m = 0; m < NV; ++m) {
          const Vec factor = divided[m] * exp2(load(s.tile_max.data + place / kTileKeys * R + m * kLanes) - s.top[m]);
          total += load(before + m * kLanes) * factor * load(s.probabilities.data + place * R + m * kLanes);
        }
        now[n * kLanes + i] = votes[(t - 1) * x.keys + key] + sum(total);
      }
  }
}

template <int NV, class T>
void iterate_block(const AttentionArgs& x, int64_t batch, int64_t head, int64_t slot, float* votes, Scratch& s,
                   float* own) {
  constexpr int R = NV * kLanes;
  const Block<NV> block = block_at<NV>(x, false, slot, 1, head, x.keys);
  const KeyHead<T> keys(x, batch, head / (x.heads / x.groups));
  attend<NV, T, false, true>(x, block, at(static_cast<const T*>(x.q), x.q_stride, batch, 0), keys, s);
  Vec divided[NV];
  for (int n = 0; n < NV; ++n) divided[n] = broadcast(1.f) / s.total[n];
  settle<NV>(x, block, votes, divided, s, own);
  for (int64_t start = block.begin, tile = 0; start < block.end; start += kTileKeys, ++tile) {
    const int64_t count = block.end - start < kTileKeys ? block.end - start : kTileKeys;
    for (int64_t t = 0; t < x.iterations; ++t) {
      Vec factor[NV];
      for (int n = 0; n < NV; ++n)
        factor[n] = load(own + t * R + n * kLanes) * divided[n] *
                    exp2(load(s.tile_max.data + tile * R + n * kLanes) - s.top[n]);
      fold_columns<Sum, NV>(s.probabilities.data + tile * kTileKeys * R, R, count, factor, votes + t * x.keys + start);
    }
  }
}

// Query blocks from the last to the first, all iterations in one pass; see `mminfer_kernels.power_iterate`.
template <class T>
int power_iterate(const AttentionArgs& x) {
  const int64_t slots = (x.queries + kLanes - 1) / kLanes;
  struct State {
    Scratch scratch;
    Buffer votes, own;
  };
  const auto scratch = [&] {
    return State{Scratch(x, true), Buffer(x.iterations * x.keys), Buffer(x.iterations * Scratch::R)};
  };
  const auto unit = [&](int64_t i, State& s) {
    const int64_t batch = i / x.heads, head = i % x.heads;
    s.votes.clear(x.iterations * x.keys);
    for (int64_t slot = (slots - 1) / kSlots * kSlots; slot >= 0; slot -= kSlots) {
      if (slots - slot >= 3) iterate_block<3, T>(x, batch, head, slot, s.votes.data, s.scratch, s.own.data);
      else if (slots - slot == 2) iterate_block<2, T>(x, batch, head, slot, s.votes.data, s.scratch, s.own.data);
      else iterate_block<1, T>(x, batch, head, slot, s.votes.data, s.scratch, s.own.data);
    }
    std::memcpy(x.mass + i * x.keys, s.votes.data + (x.iterations - 1) * x.keys, x.keys * sizeof(float));
  };
  return parallel_for(x.batch * x.heads, x.threads, scratch, unit);
}

template <class T>
int prompt_attention(const AttentionArgs& x) {
  if (x.out && (x.mass || x.peak)) return attention<T, true, true>(x);
  return x.out ? attention<T, true, false>(x) : attention<T, false, true>(x);
}

}  // namespace mminfer

using namespace mminfer;

// dtype: 0 float32, 1 bfloat16, 2 float16. 0 on success, 1 where memory ran out.
extern "C" int mminfer_prompt_attention(const AttentionArgs* x, int dtype) {
  return dtype == 0   ? prompt_attention<float>(*x)
         : dtype == 1 ? prompt_attention<BFloat16>(*x)
                      : prompt_attention<Float16>(*x);
}

extern "C" int mminfer_power_iterate(const AttentionArgs* x, int dtype) {
  return dtype == 0   ? power_iterate<float>(*x)
         : dtype == 1 ? power_iterate<BFloat16>(*x)
                      : power_iterate<Float16>(*x);
}
