// Plain C entry point of the decode step.
#include "mminfer/cpu/decode_step.h"

using namespace mminfer;

extern "C" int mminfer_decode_step(const StepLayer* layers, const StepCache* caches, const StepHead* head,
                                   const StepShape* shape, float eps, float scale, const float* cos, const float* sin,
                                   int64_t table_stride, float* hidden, int32_t threads) {
  try {
    decode_step(layers, caches, *head, *shape, eps, scale, cos, sin, table_stride, hidden, threads);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
