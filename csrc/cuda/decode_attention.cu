// One kernel of the template; the compiler is told MMINFER_KERNEL (its name), MMINFER_BLOCKS (of a multiprocessor),
// MMINFER_SCALAR, MMINFER_SIZE (the head size, rounded up), MMINFER_ROWS and MMINFER_ALIGNED.
#include "mminfer/decode_attention_block.h"

using namespace mminfer;
using Shape = DecodeShape<MMINFER_SCALAR, MMINFER_SIZE, MMINFER_ROWS>;

extern "C" __global__ void __launch_bounds__(Shape::THREADS, MMINFER_BLOCKS)
    MMINFER_KERNEL(const __grid_constant__ DecodeAttentionArguments arguments) {
  __shared__ alignas(16) float shared[Shape::SHARED];
  CudaBlock block(shared);
  using Body = DecodeAttention<MMINFER_SCALAR, MMINFER_SIZE, MMINFER_ROWS, MMINFER_ALIGNED, false, CudaBlock>;
  Body(arguments, block).run();
}
