// Over packed caches, one kernel of the template of decode_attention.cu, with the same macros.
#include "mminfer/decode_attention_block.h"

using namespace mminfer;
using Shape = DecodeShape<MMINFER_SCALAR, MMINFER_SIZE, MMINFER_ROWS>;

extern "C" __global__ void __launch_bounds__(Shape::THREADS, MMINFER_BLOCKS)
    MMINFER_KERNEL(const __grid_constant__ DecodeAttentionArguments arguments) {
  __shared__ alignas(16) float shared[Shape::SHARED];
  CudaBlock block(shared);
  using Body = DecodeAttention<MMINFER_SCALAR, MMINFER_SIZE, MMINFER_ROWS, MMINFER_ALIGNED, true, CudaBlock>;
  Body(arguments, block).run();
}
