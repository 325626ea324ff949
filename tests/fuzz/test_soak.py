"""Sixty mixed requests leave nothing behind; `python -m tests.fuzz.soak` asks a thousand."""

import pytest

from tests.fuzz.soak import Sample, check_flat, growth, soak


@pytest.mark.slow
def test_requests_leave_nothing_behind():
    check_flat(soak(60, every=6))


def test_a_leak_is_seen():
    """Of 100 kB a request, in resident memory among samples that come and go by 2 MB; of a thread; of a file."""
    noise = [0, 2e6, -1e6, 1e6, -2e6, 0.5e6, 2e6, -1e6, 0, -0.5e6, 1e6]
    flat = [Sample(60 * k, int(8e8 + some), 10**8, 5, 6) for k, some in enumerate(noise)]
    assert abs(growth(flat)) < 50_000
    check_flat(flat)
    for name in ("rss_bytes", "tensor_bytes"):
        with pytest.raises(AssertionError, match=f"{name}: .* bytes a request"):
            check_flat([one._replace(**{name: getattr(one, name) + 100_000 * one.requests}) for one in flat])
    for name in ("threads", "handles"):
        with pytest.raises(AssertionError, match=f"{name} grow"):
            check_flat([one._replace(**{name: one.requests}) for one in flat])
