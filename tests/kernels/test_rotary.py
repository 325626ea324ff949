import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mminfer_kernels import apply_rotary, rotary_table
from transformers import Qwen2_5_VLTextConfig, Qwen3VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

pytestmark = pytest.mark.usefixtures("backend")


def inverse_frequencies(size=64, base=1e6):
    return 1 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)


@settings(deadline=None, max_examples=60)
@given(whole=st.integers(0, 2**20), fraction=st.integers(0, 255), base=st.sampled_from([1e4, 1e6]))
def test_right_to_1e_6_up_to_a_million_positions(whole, fraction, base):
    position = torch.tensor([whole + fraction / 256], dtype=torch.float64)
    inv_freq = inverse_frequencies(base=base)
    angle = (position[:, None] * inv_freq.double()).repeat(1, 2)
    cos, sin = rotary_table(position, inv_freq)
    assert (cos.double() - angle.cos()).abs().max() <= 1e-6
    assert (sin.double() - angle.sin()).abs().max() <= 1e-6


def test_float32_angles_would_not_do():
    """What the bar above guards against: the authors' float32 product is off by far more."""
    position, inv_freq = torch.tensor([2**20 - 3 / 256], dtype=torch.float64), inverse_frequencies()
    rounded = (position.float()[:, None] * inv_freq).cos().double()
    assert (rounded - (position[:, None] * inv_freq.double()).cos()).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(1,), (63,), (2, 300), (2, 0)])
def test_shapes_scaling_and_dtype(shape):
    position = torch.rand(shape, dtype=torch.float64) * 1000
    cos, sin = rotary_table(position, inverse_frequencies(), attention_scaling=1.5, dtype=torch.bfloat16)
    assert cos.shape == sin.shape == (*shape, 64) and cos.dtype == torch.bfloat16
    assert torch.equal(cos[..., :32], cos[..., 32:])
    exact, _ = rotary_table(position, inverse_frequencies(), attention_scaling=1.5, dtype=torch.float64)
    torch.testing.assert_close(cos.double(), exact, rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "module", "interleaved"),
    [
        (Qwen2_5_VLTextConfig, Qwen2_5_VLRotaryEmbedding, False),
        (Qwen3VLTextConfig, Qwen3VLTextRotaryEmbedding, True),
    ],
)
def test_sections_are_the_hosts(device, config, module, interleaved):
    sections = [8, 12, 12]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    host = module(config(hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=rope)).to(device)
    position = torch.randint(0, 50, (3, 2, 63))
    wanted = host(torch.zeros(1), position)
    found = rotary_table(position.double(), host.inv_freq, sections=sections, interleaved=interleaved)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_the_hosts(dtype):
    q, k = torch.randn(2, 6, 63, 64).to(dtype), torch.randn(2, 2, 63, 64).to(dtype)
    cos, sin = rotary_table(torch.rand(2, 63, dtype=torch.float64) * 500, inverse_frequencies(), dtype=dtype)
    for mine, theirs in zip(
        apply_rotary(q, k, cos, sin, "reference"), apply_rotary_pos_emb(q, k, cos, sin), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_float32_tables_rotate_half_precision_in_float32():
    q = torch.randn(2, 6, 63, 64).bfloat16()
    cos, sin = rotary_table(torch.rand(63, dtype=torch.float64) * 500, inverse_frequencies())
    wanted = apply_rotary(q.float(), q.float(), cos, sin)[0].bfloat16()
    found = apply_rotary(q, q, cos, sin)[0]
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)

    def score(at_q, at_k):
        tables = [rotary_table(torch.tensor([at]).double(), inverse_frequencies()) for at in (at_q, at_k)]
        rotated_q = apply_rotary(q, q, *tables[0])[0]
        rotated_k = apply_rotary(k, k, *tables[1])[0]
        torch.testing.assert_close(rotated_q.norm(), q.norm())
        return (rotated_q * rotated_k).sum()

    torch.testing.assert_close(score(7.25, 3.0), score(2**20 + 4.25, 2**20), rtol=1e-4, atol=1e-4)


def test_wrong_input_is_named():
    position, inv_freq = torch.zeros(3, 2, 5, dtype=torch.float64), inverse_frequencies()
    wrong = {
        "wanted float64": lambda: rotary_table(position.float(), inv_freq),
        "inv_freq has shape": lambda: rotary_table(position, inv_freq[None]),
        "add up to 30": lambda: rotary_table(position, inv_freq, sections=[10, 10, 10]),
        "one an axis": lambda: rotary_table(position, inv_freq, sections=[16, 16], interleaved=True),
        "wanted \\[A, ..., N\\]": lambda: rotary_table(position[0, 0], inv_freq, sections=[32]),
        "one dtype": lambda: apply_rotary(
            torch.ones(1, 5, 4), torch.ones(1, 5, 4), torch.ones(5, 4), torch.ones(5, 4).half()
        ),
        "even D": lambda: apply_rotary(position, position, position[0, :, :3], position[0, :, :3]),
        "k is": lambda: apply_rotary(torch.ones(1, 5, 4), torch.ones(1, 6, 4), torch.ones(5, 4), torch.ones(5, 4)),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()
