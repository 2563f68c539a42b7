"""`infer.py --compile`: one graph for each network, made once for a folder of many sizes. Slow: it is traced."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from consissr.models import fast
from consissr.restorer import Restorer


@pytest.mark.slow
def test_twenty_sizes_are_compiled_once(tiny_model, monkeypatch):
    """The backend only counts. Maps are small: above 20,480 values torch's CPU convolutions are others, made again."""
    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, **how: compile_(f, backend=counter, **how))
    restorer = Restorer.load(str(tiny_model), "cpu", "fp32")
    sizes = [(8 + 4 * (i % 5), 8 + 4 * (i // 5)) for i in range(20)]  # a square first
    images = [torch.rand(1, 3, *size) * 2 - 1 for size in sizes]
    plain = [restorer(image, 2) for image in images]
    restorer.compile(one_size=False)
    compiled = [restorer(image, 2) for image in images]
    assert counter.frame_count == 3  # denoiser, encoder, decoder
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, compiled, strict=True))


def test_one_product_for_queries_keys_and_values(tiny_model):
    restorer = Restorer.load(str(tiny_model), "cpu", "fp32")
    x = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain = restorer(x, 2)
    assert fast.fuse_projections(restorer.denoiser) == 6
    assert torch.allclose(restorer(x, 2), plain, atol=1e-5)
    assert fast.fuse_projections(restorer.denoiser) == 0
