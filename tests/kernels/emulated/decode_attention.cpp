// csrc/cuda/decode_attention.cu on emulated blocks, under the same macros.
#include "block.h"
#include "mminfer/decode_attention_block.h"

using namespace mminfer;
using Shape = DecodeShape<MMINFER_SCALAR, MMINFER_SIZE, MMINFER_ROWS>;

extern "C" const char* run(const i64* grid, const DecodeAttentionArguments* arguments) {
  return emulate(grid, Shape::SHARED, [&](EmulatedBlock& block) {
    using Body = DecodeAttention<MMINFER_SCALAR, MMINFER_SIZE, MMINFER_ROWS, MMINFER_ALIGNED, false, EmulatedBlock>;
    Body(*arguments, block).run();
  });
}
