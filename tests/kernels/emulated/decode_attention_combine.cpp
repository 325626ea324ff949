// csrc/cuda/decode_attention_combine.cu on emulated blocks, under the same macros.
#include "block.h"
#include "mminfer/decode_attention_block.h"

using namespace mminfer;

extern "C" const char* run(const i64* grid, const DecodeAttentionArguments* arguments) {
  return emulate(grid, 0, [&](EmulatedBlock& block) {
    combine_splits<MMINFER_SCALAR, EMULATED_THREADS>(*arguments, block);
  });
}
