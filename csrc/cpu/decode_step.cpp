// Binding of the decode step: plain C, pointers and sizes.
#include "mminfer/cpu/decode_step.h"

extern "C" int mminfer_decode_step(const mminfer::DecodeLayer* layers, const mminfer::DecodeCache* caches,
                                   const mminfer::DecodeShape* shape, float eps, float scale, const float* cos,
                                   const float* sin, int64_t table_stride, float* hidden, int32_t threads) {
  return mminfer::decode_step(layers, caches, *shape, eps, scale, cos, sin, table_stride, hidden, threads);
}
