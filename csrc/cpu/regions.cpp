// Regions that grow from neighbours, and products of pairs of rows. What is grown and by which rule, the reference in
// PyTorch says (`mminfer_kernels/regions/reference.py`); here it is the same rounds over plain arrays.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "mminfer/cpu/buffer.h"
#include "mminfer/cpu/parallel.h"
#include "mminfer/cpu/vec.h"

namespace mminfer {

struct None {};
constexpr int64_t kPairs = 128;    // of rows that one unit of work takes
constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class T>
inline Vec get(const T* p, int64_t d, int64_t columns) {
  return columns - d < kLanes ? load_some(p + d, (int)(columns - d)) : load(p + d);
}

template <class T>
float dot(const T* a, const T* b, int64_t columns) {
  Vec one = zero(), other = zero();
  int64_t d = 0;
  for (; d + 2 * kLanes <= columns; d += 2 * kLanes) {
    one += load(a + d) * load(b + d);
    other += load(a + d + kLanes) * load(b + d + kLanes);
  }
  for (; d < columns; d += kLanes) one += get(a, d, columns) * get(b, d, columns);
  return sum(one + other);
}

struct DotsArgs {
  const void* x;                 // [P, C]
  const int64_t *first, *second;  // [E]
  float* out;                    // [E]
  int64_t pairs, columns, row;   // row: stride
  int64_t threads;
};

template <class T>
int row_dots(const DotsArgs& x) {
  const T* rows = static_cast<const T*>(x.x);
  return parallel_for((x.pairs + kPairs - 1) / kPairs, x.threads, [] { return None{}; }, [&](int64_t i, None&) {
    for (int64_t e = i * kPairs; e < (i + 1) * kPairs && e < x.pairs; ++e)
      x.out[e] = dot(rows + x.first[e] * x.row, rows + x.second[e] * x.row, x.columns);
  });
}

struct GrowArgs {
  const float* x;         // [P, C]
  const float* sizes;     // [P]
  const int64_t* pairs;   // [2, E]
  const int64_t* group;   // [P]; null: all are one
  const int64_t* spare;   // [groups]; null: all may go
  const int64_t* block;   // [P]; null: none
  int64_t* owner;         // [P], written
  int64_t count, columns, edges, groups, threads;
  float threshold;        // not a number: any
  float largest;          // infinity: any
  float least_cost;       // of a join
};

// What is known of a region: the square of its sum of unit vectors by size, its patches, and the sums of its members'
// own squares and squared sizes, which are no cosines of two.
struct Facts {
  float norm, size, own, squares;
};

struct Edge {
  int64_t a, b;
  float product;
};
inline bool before(const Edge& x, const Edge& y) { return x.a != y.a ? x.a < y.a : x.b < y.b; }

struct Join {
  int64_t into, gone;
  float cost;
};

class Growing {
 public:
  explicit Growing(const GrowArgs& x)
      : x_(x), sums_(x.count * x.columns), facts_(x.count), label_(x.count), changed_(x.count), height_(x.count),
        best_(x.count), turn_(x.count), limit_(x.groups), costs_(x.spare ? x.groups : 0) {
    for (int64_t g = 0; g < x.groups; ++g) limit_[g] = !x.spare || x.spare[g] > 0 ? kInfinity : -kInfinity;
  }

  // 1 where memory ran out, else 0.
  int run() {
    if (measure_rows()) return 1;
    edges_.reserve(x_.edges);
    for (int64_t e = 0; e < x_.edges; ++e) {
      const int64_t a = x_.pairs[e], b = x_.pairs[x_.edges + e];
      add(edges_, std::min(a, b), std::max(a, b), 0.f);
    }
    every_.resize(edges_.size());
    for (size_t e = 0; e < every_.size(); ++e) every_[e] = (int64_t)e;
    if (measure_edges(every_)) return 1;
    for (bool sorted = false; !edges_.empty(); sorted = true) {
      drop_refused();
      choose();
      note();
      if (join(sorted)) return 1;
    }
    write_owners();
    return 0;
  }

 private:
  int64_t group(int64_t p) const { return x_.group ? x_.group[p] : 0; }
  const float* sum_of(int64_t p) const { return sums_.data + p * x_.columns; }

  void add(std::vector<Edge>& to, int64_t a, int64_t b, float product) const {
    if (facts_[a].size + facts_[b].size <= x_.largest) to.push_back({a, b, product});
  }

  int measure_rows() {
    return parallel_for((x_.count + kPairs - 1) / kPairs, x_.threads, [] { return None{}; }, [&](int64_t i, None&) {
      for (int64_t p = i * kPairs; p < (i + 1) * kPairs && p < x_.count; ++p) {
        const float *row = x_.x + p * x_.columns, length = std::sqrt(dot(row, row, x_.columns));
        const float factor = x_.sizes[p] / (length < 1e-12f ? 1e-12f : length);
        float* to = sums_.data + p * x_.columns;
        for (int64_t d = 0; d < x_.columns; ++d) to[d] = row[d] * factor;
        const float norm = dot(to, to, x_.columns);
        facts_[p] = {norm, x_.sizes[p], norm, x_.sizes[p] * x_.sizes[p]};
        label_[p] = p;
      }
    });
  }

  int measure_edges(const std::vector<int64_t>& which) {
    const int64_t count = (int64_t)which.size();
    return parallel_for((count + kPairs - 1) / kPairs, x_.threads, [] { return None{}; }, [&](int64_t i, None&) {
      for (int64_t n = i * kPairs; n < (i + 1) * kPairs && n < count; ++n) {
        Edge& e = edges_[which[n]];
        e.product = dot(sum_of(e.a), sum_of(e.b), x_.columns);
      }
    });
  }

  // Leaves the edges whose regions may join, with their unions and costs. What is not a number may not.
  void drop_refused() {
    size_t left = 0;
    unions_.resize(edges_.size());
    cost_.resize(edges_.size());
    for (const Edge& e : edges_) {
      const Facts &a = facts_[e.a], &b = facts_[e.b];
      const Facts both{a.norm + b.norm + 2 * e.product, a.size + b.size, a.own + b.own, a.squares + b.squares};
      float cost = a.norm / a.size + b.norm / b.size - both.norm / both.size;
      if (cost < x_.least_cost) cost = x_.least_cost;  // equal tokens are equally good
      const float alike = (both.norm - both.own) / (both.size * both.size - both.squares);
      const bool like = std::isnan(x_.threshold) || alike >= x_.threshold;
      if (!like || !(std::max({cost, height_[e.a], height_[e.b]}) <= limit_[group(e.a)]) || cost != cost) continue;
      edges_[left] = e;
      unions_[left] = both;
      cost_[left++] = cost;
    }
    edges_.resize(left);
  }

  // Takes the edges that are the best of both their regions, or the first of equally good ones.
  void choose() {
    const int64_t count = (int64_t)edges_.size();
    for (const Edge& e : edges_) {
      best_[e.a] = best_[e.b] = kInfinity;
      turn_[e.a] = turn_[e.b] = 2 * count;
    }
    for (int64_t i = 0; i < count; ++i)
      for (const int64_t p : {edges_[i].a, edges_[i].b}) best_[p] = std::min(best_[p], cost_[i]);
    const auto is_best = [&](int64_t i) { return cost_[i] == best_[edges_[i].a] && cost_[i] == best_[edges_[i].b]; };
    const auto turn = [&](int64_t i) {
      return i + (x_.block && x_.block[edges_[i].a] != x_.block[edges_[i].b] ? count : 0);
    };
    for (int64_t i = 0; i < count; ++i)
      if (is_best(i))
        for (const int64_t p : {edges_[i].a, edges_[i].b}) turn_[p] = std::min(turn_[p], turn(i));
    chosen_.clear();
    for (int64_t i = 0; i < count; ++i)
      if (is_best(i) && turn_[edges_[i].a] == turn(i) && turn_[edges_[i].b] == turn(i)) chosen_.push_back(i);
  }

  // Takes the joins down, and where a group has its number of them, what the dearest costs that stands.
  void note() {
    full_.clear();
    for (const int64_t i : chosen_) {
      const Edge& e = edges_[i];
      const float cost = std::max({cost_[i], height_[e.a], height_[e.b]});
      height_[e.a] = cost;
      joins_.push_back({e.a, e.b, cost});
      if (!x_.spare) continue;
      const int64_t g = group(e.a);
      costs_[g].push_back(cost);
      if ((int64_t)costs_[g].size() >= x_.spare[g]) full_.push_back(g);
    }
    std::sort(full_.begin(), full_.end());
    full_.erase(std::unique(full_.begin(), full_.end()), full_.end());
    for (const int64_t g : full_) {
      const auto dearest = costs_[g].begin() + (x_.spare[g] - 1);
      std::nth_element(costs_[g].begin(), dearest, costs_[g].end());
      limit_[g] = *dearest;
    }
  }

  // Joins the regions of the chosen edges, no two of which touch; the edges that are left stay in order.
  int join(bool sorted) {
    for (const int64_t i : chosen_) {
      const Edge& e = edges_[i];
      facts_[e.a] = unions_[i];
      label_[e.b] = e.a;
      changed_[e.a] = changed_[e.b] = 1;
      float* to = sums_.data + e.a * x_.columns;
      const float* from = sum_of(e.b);
      for (int64_t d = 0; d < x_.columns; ++d) to[d] += from[d];
    }
    still_.clear();
    moved_.clear();
    for (const Edge& e : edges_) {
      const int64_t a = label_[e.a], b = label_[e.b];
      const bool moves = changed_[e.a] || changed_[e.b];
      if (a != b) add(moves ? moved_ : still_, std::min(a, b), std::max(a, b), e.product);
    }
    for (const int64_t i : chosen_) changed_[edges_[i].a] = changed_[edges_[i].b] = 0;
    if (!sorted) std::sort(still_.begin(), still_.end(), before);
    std::sort(moved_.begin(), moved_.end(), before);
    const auto same = [](const Edge& x, const Edge& y) { return x.a == y.a && x.b == y.b; };
    moved_.erase(std::unique(moved_.begin(), moved_.end(), same), moved_.end());
    for (Edge& e : moved_) e.product = kInfinity;  // not known yet
    edges_.resize(still_.size() + moved_.size());
    std::merge(still_.begin(), still_.end(), moved_.begin(), moved_.end(), edges_.begin(), before);
    every_.clear();
    for (size_t e = 0; e < edges_.size(); ++e)
      if (edges_[e].product == kInfinity) every_.push_back((int64_t)e);
    return measure_edges(every_);
  }

  // The first member of each one's region, by the joins that stand: in each group so many as it has to lose.
  void write_owners() {
    for (int64_t p = 0; p < x_.count; ++p) x_.owner[p] = p;
    std::stable_sort(joins_.begin(), joins_.end(), [](const Join& x, const Join& y) { return x.cost < y.cost; });
    std::vector<int64_t> taken(x_.groups, 0);
    for (const Join& j : joins_)
      if (!x_.spare || taken[group(j.into)]++ < x_.spare[group(j.into)]) x_.owner[j.gone] = j.into;
    for (int64_t p = 0; p < x_.count; ++p) x_.owner[p] = x_.owner[x_.owner[p]];  // an owner comes before its members
  }

  const GrowArgs& x_;
  Buffer sums_;
  std::vector<Facts> facts_, unions_;
  std::vector<int64_t> label_;
  std::vector<char> changed_;
  std::vector<float> height_, best_;
  std::vector<int64_t> turn_;
  std::vector<float> limit_, cost_;
  std::vector<std::vector<float>> costs_;  // of the joins of each group
  std::vector<Edge> edges_, still_, moved_;
  std::vector<int64_t> every_, chosen_, full_;
  std::vector<Join> joins_;
};

}  // namespace mminfer

using namespace mminfer;

extern "C" int mminfer_row_dots(const DotsArgs* x, int dtype) {
  return dtype == 0 ? row_dots<float>(*x) : dtype == 1 ? row_dots<BFloat16>(*x) : row_dots<Float16>(*x);
}

extern "C" int mminfer_grow_regions(const GrowArgs* x) {
  try {
    return Growing(*x).run();
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
