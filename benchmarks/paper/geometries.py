"""Published geometries, and what a prompt pass through them would record: counts need no weights."""

from collections.abc import Sequence

from mminfer.metrics.flops import causal_pairs
from mminfer.metrics.records import LayerRecord, PromptRecord
from mminfer.models.spec import ModelSpec

QWEN2_7B = ModelSpec(
    "llava_onevision", num_layers=28, hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, head_dim=128,
    intermediate_size=18_944, vocab_size=152_064, max_position_embeddings=32_768,
)  # fmt: skip
VICUNA_7B = ModelSpec(
    "llava", num_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=32, head_dim=128,
    intermediate_size=11_008, vocab_size=32_000, max_position_embeddings=4096,
)  # fmt: skip
VICUNA_13B = ModelSpec(
    "llava", num_layers=40, hidden_size=5120, num_attention_heads=40, num_key_value_heads=40, head_dim=128,
    intermediate_size=13_824, vocab_size=32_000, max_position_embeddings=4096,
)  # fmt: skip


def record_of(rows: Sequence[int], merge_flops: int = 0) -> PromptRecord:
    """One sequence of so many rows in each layer, every row with a query and an FFN; nothing was cached before."""
    layers = [
        LayerRecord(
            rows=(n,), queries=(n,), keys=(n,), ffn=(n,), pairs=(causal_pairs(n, 0),), head_entries=((n,),),
            weighed=(0,), cache_flops=(0,), prune_flops=(0,),
        )
        for n in rows
    ]  # fmt: skip
    return PromptRecord((0,), (rows[0],), (0,), (rows[0],), layers, merge_flops)
