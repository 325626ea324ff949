// Rotation by fractional positions. Angles are formed and brought into one turn in float64: a position near 2^20 has a
// float32 spacing of 1/8.
#include <cmath>

#include "mminfer/cpu/attention.h"
#include "mminfer/cpu/buffer.h"
#include "mminfer/cpu/parallel.h"
#include "mminfer/cpu/vec.h"

namespace mminfer {

struct RotaryArgs {
  const double* position;  // [A, B, N] or [B, N]
  const float* inv_freq;   // [D / 2]
  const int64_t* axes;     // [D / 2]: the axis of each frequency; null: 0
  void *q, *k;             // [B, H, N, D], [B, G, N, D], overwritten
  void *cos, *sin;         // or the table [B * N, D], written
  int64_t batch, heads, groups, tokens, half;
  Rows3 q_stride, k_stride;
  int64_t threads;
  float scaling;
};

// sin and cos of angles in [-pi / 4, pi / 4], then turned by quarters: within 1e-7.
inline void turn(const double* angle, int64_t count, float scaling, float* cos, float* sin) {
  for (int64_t j = 0; j < count; ++j) {
    const double quarters = std::nearbyint(angle[j] * 0.63661977236758134);
    const float x = (float)(angle[j] - quarters * 1.5707963267948966), y = x * x;
    const float s = x + x * y * (-1.6666655e-1f + y * (8.3321608e-3f + y * -1.9515296e-4f));
    const float c = 1.f + y * (-0.5f + y * (4.1666645e-2f + y * (-1.3887316e-3f + y * 2.4433157e-5f)));
    const int64_t quarter = std::fabs(quarters) < 9e15 ? (int64_t)quarters : 0;  // farther out no angle is known
    const float across = quarter & 1 ? c : s, along = quarter & 1 ? s : c;
    sin[j] = scaling * (quarter & 2 ? -across : across);
    cos[j] = scaling * ((quarter + 1) & 2 ? -along : along);
  }
}

struct Angles {
  Buffer angle, cos, sin;
  explicit Angles(int64_t half) : angle(2 * half), cos(half), sin(half) {}

  void form(const RotaryArgs& x, int64_t token) {
    double* a = reinterpret_cast<double*>(angle.data);
    const int64_t all = x.batch * x.tokens;
    for (int64_t j = 0; j < x.half; ++j)
      a[j] = x.position[(x.axes ? x.axes[j] * all : 0) + token] * (double)x.inv_freq[j];
    turn(a, x.half, x.scaling, cos.data, sin.data);
  }
};

template <class T>
inline void rotate(T* row, const Angles& at, int64_t half) {
  for (int64_t j = 0; j < half; ++j) {
    const float a = to_float(row[j]), b = to_float(row[j + half]);
    from_float(a * at.cos.data[j] - b * at.sin.data[j], row[j]);
    from_float(b * at.cos.data[j] + a * at.sin.data[j], row[j + half]);
  }
}

constexpr int64_t kTokens = 32;  // a unit of work

template <class Each>
int over_tokens(const RotaryArgs& x, const Each& each) {
  const int64_t all = x.batch * x.tokens;
  return parallel_for((all + kTokens - 1) / kTokens, x.threads, [&] { return Angles(x.half); },
                      [&](int64_t i, Angles& at) {
                        for (int64_t t = i * kTokens; t < (i + 1) * kTokens && t < all; ++t) at.form(x, t), each(t, at);
                      });
}

template <class T>
int rotary(const RotaryArgs& x) {
  return over_tokens(x, [&](int64_t token, const Angles& at) {
    const int64_t batch = token / x.tokens, row = token % x.tokens;
    T* q = static_cast<T*>(x.q) + batch * x.q_stride.batch + row * x.q_stride.row;
    T* k = static_cast<T*>(x.k) + batch * x.k_stride.batch + row * x.k_stride.row;
    for (int64_t h = 0; h < x.heads; ++h) rotate(q + h * x.q_stride.head, at, x.half);
    for (int64_t g = 0; g < x.groups; ++g) rotate(k + g * x.k_stride.head, at, x.half);
  });
}

template <class T>
int rotary_table(const RotaryArgs& x) {
  return over_tokens(x, [&](int64_t token, const Angles& at) {
    T* cos = static_cast<T*>(x.cos) + token * 2 * x.half;
    T* sin = static_cast<T*>(x.sin) + token * 2 * x.half;
    for (int64_t j = 0; j < x.half; ++j) {
      from_float(at.cos.data[j], cos[j]), from_float(at.cos.data[j], cos[j + x.half]);
      from_float(at.sin.data[j], sin[j]), from_float(at.sin.data[j], sin[j + x.half]);
    }
  });
}

struct ApplyArgs {
  const void *x, *cos, *sin;  // [L, heads, N, D]; the table in the type of x or float32
  void* out;                  // contiguous
  int64_t leading, heads, tokens, half;
  int64_t x_leading, x_head, x_row, table_leading;  // strides; 0: one table for all
  int64_t threads;
};

template <class T, class Table>
int apply_rotary(const ApplyArgs& x) {
  const int64_t chunks = (x.tokens + kTokens - 1) / kTokens;
  struct None {};
  return parallel_for(x.leading * x.heads * chunks, x.threads, [] { return None{}; }, [&](int64_t i, None&) {
    const int64_t row = i / chunks, leading = row / x.heads, head = row % x.heads;
    for (int64_t t = i % chunks * kTokens; t < (i % chunks + 1) * kTokens && t < x.tokens; ++t) {
      const T* from = static_cast<const T*>(x.x) + leading * x.x_leading + head * x.x_head + t * x.x_row;
      const Table* cos = static_cast<const Table*>(x.cos) + leading * x.table_leading + t * 2 * x.half;
      const Table* sin = static_cast<const Table*>(x.sin) + leading * x.table_leading + t * 2 * x.half;
      T* to = static_cast<T*>(x.out) + (row * x.tokens + t) * 2 * x.half;
      for (int64_t j = 0; j < x.half; ++j) {
        const float a = to_float(from[j]), b = to_float(from[j + x.half]);
        from_float(a * to_float(cos[j]) - b * to_float(sin[j]), to[j]);
        from_float(b * to_float(cos[j + x.half]) + a * to_float(sin[j + x.half]), to[j + x.half]);
      }
    }
  });
}

}  // namespace mminfer

using namespace mminfer;

#define BY_DTYPE(name) (dtype == 0 ? name<float>(*x) : dtype == 1 ? name<BFloat16>(*x) : name<Float16>(*x))

extern "C" int mminfer_rotary(const RotaryArgs* x, int dtype) { return BY_DTYPE(rotary); }
extern "C" int mminfer_rotary_table(const RotaryArgs* x, int dtype) { return BY_DTYPE(rotary_table); }

extern "C" int mminfer_apply_rotary(const ApplyArgs* x, int dtype, int table_dtype) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    return table_dtype == 0 ? apply_rotary<T, float>(*x)
                            : table_dtype == 1 ? apply_rotary<T, BFloat16>(*x) : apply_rotary<T, Float16>(*x);
  };
  return dtype == 0 ? run(0.f) : dtype == 1 ? run(BFloat16{}) : run(Float16{});
}
