// csrc/cuda/merge_rows.cu on emulated blocks, under the same macros.
#include "block.h"
#include "mminfer/merge_rows_block.h"

using namespace mminfer;

extern "C" const char* run(const i64* grid, const MergeRowsArguments* arguments) {
  return emulate(grid, 0, [&](EmulatedBlock& block) {
    merge_rows<MMINFER_SCALAR, MMINFER_ALIGNED, EMULATED_THREADS>(*arguments, block);
  });
}
