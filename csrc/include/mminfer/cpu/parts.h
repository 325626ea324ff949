// Segments of rows as one line, and the line cut into equal parts: threads that share the parts have the same to do,
// however much the segments' lengths differ.
#pragma once
#include <algorithm>
#include <cstdint>

namespace mminfer {

class Parts {
 public:
  // ends: [segments + 1], the rows up to the end of each, beginning with 0; none is empty. count: 1 to all the rows.
  Parts(const int64_t* ends, int64_t segments, int64_t count) : ends_(ends), segments_(segments), count_(count) {}

  int64_t count() const { return count_; }

  // What parts find out about segments has slots of its own, those of a segment side by side.
  int64_t slots() const { return segments_ + count_ - 1; }
  int64_t first_slot(int64_t segment) const { return segment + part_of(ends_[segment]); }
  int64_t last_slot(int64_t segment) const { return segment + part_of(ends_[segment + 1] - 1); }

  // use(segment, from, to, slot) for each segment that the part holds rows of, counted from the segment's first.
  template <class Use>
  void each(int64_t part, Use use) const {
    const int64_t end = cut(part + 1);
    int64_t at = cut(part), segment = std::upper_bound(ends_ + 1, ends_ + segments_, at) - ends_ - 1;
    for (; at < end; ++segment) {
      const int64_t first = ends_[segment], to = std::min(end, ends_[segment + 1]);
      use(segment, at - first, to - first, part + segment);
      at = to;
    }
  }

 private:
  int64_t cut(int64_t part) const { return ends_[segments_] * part / count_; }
  int64_t part_of(int64_t row) const { return ((row + 1) * count_ - 1) / ends_[segments_]; }  // the last cut before it

  const int64_t* ends_;
  int64_t segments_, count_;
};

}  // namespace mminfer
