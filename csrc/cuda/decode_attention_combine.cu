// The compiler is told MMINFER_KERNEL (the kernel's name), MMINFER_THREADS, MMINFER_BLOCKS and MMINFER_SCALAR.
#include "mminfer/decode_attention_block.h"

using namespace mminfer;

extern "C" __global__ void __launch_bounds__(MMINFER_THREADS, MMINFER_BLOCKS)
    MMINFER_KERNEL(const __grid_constant__ DecodeAttentionArguments arguments) {
  CudaBlock block(nullptr);
  combine_splits<MMINFER_SCALAR, MMINFER_THREADS>(arguments, block);
}
