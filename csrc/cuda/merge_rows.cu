// The compiler is told MMINFER_KERNEL (the kernel's name), MMINFER_THREADS, MMINFER_BLOCKS, MMINFER_SCALAR and
// MMINFER_ALIGNED.
#include "mminfer/merge_rows_block.h"

using namespace mminfer;

extern "C" __global__ void __launch_bounds__(MMINFER_THREADS, MMINFER_BLOCKS)
    MMINFER_KERNEL(const __grid_constant__ MergeRowsArguments arguments) {
  CudaBlock block(nullptr);
  merge_rows<MMINFER_SCALAR, MMINFER_ALIGNED, MMINFER_THREADS>(arguments, block);
}
