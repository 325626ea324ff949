// Memory of a thread, aligned to cache lines. Not std::vector: it would clear what is about to be written.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace mminfer {

// So many floats, rounded up to cache lines: what lies behind begins at one, as loads of whole vectors like it.
inline int64_t whole_lines(int64_t count) { return (count + 15) / 16 * 16; }

struct Buffer {
  float* data = nullptr;
  explicit Buffer(int64_t count) {
    if (count <= 0) return;
    data = static_cast<float*>(std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64));
    if (!data) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void clear(int64_t count) { std::memset(data, 0, static_cast<size_t>(count) * sizeof(float)); }
};

}  // namespace mminfer
