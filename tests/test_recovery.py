"""Where memory runs out, or a result is not a number: what Restorer does with a small model of random weights."""

import pytest
import torch

from consissr.errors import UserError
from consissr.restorer import Restorer


@pytest.fixture(scope="module")
def restorer(tiny_model):
    return Restorer.load(str(tiny_model), device="cpu")


def failing(restorer, monkeypatch, times):
    """Makes the next `times` attempts run out of memory; what tiles and batches were tried."""
    tried, original = [], Restorer.restore_latent

    def restore_latent(self, x, draw, **rest):
        tried.append((len(x), rest["tiles"]))
        if len(tried) <= times:
            raise torch.OutOfMemoryError("no memory left")
        return original(self, x, draw, **rest)

    monkeypatch.setattr(Restorer, "restore_latent", restore_latent)
    return tried


def test_memory_running_out_halves_the_batch_then_the_tiles(restorer, monkeypatch):
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = restorer(x, 2, tile=0, vae_tile=0, batch_size=2)
    tried = failing(restorer, monkeypatch, 2)
    result = restorer(x, 2, tile=0, vae_tile=0, batch_size=2)
    assert [count for count, _ in tried] == [2, 1, 1, 1]
    assert [tiles.diffusion[0] for _, tiles in tried] == [0, 0, 16, 0]
    assert torch.allclose(result[1], whole[1], atol=1e-4)
    assert result.isfinite().all()


def test_no_batch_changes_its_images_tiles(restorer, monkeypatch):
    """Where memory does not do for three images in one piece, two and one are restored, as each would be alone."""
    monkeypatch.setattr("consissr.models.tiles.total_memory", lambda device: 2**25)
    tried = failing(restorer, monkeypatch, 0)
    x = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together, alone = restorer(x, 2, batch_size=3), restorer(x[2:], 2, keys=[2])
    assert [count for count, _ in tried] == [2, 1, 1] and {tiles.vae for _, tiles in tried} == {0}
    assert torch.allclose(together[2:], alone, atol=1e-4)


def test_progress_of_a_batch_goes_on_in_its_parts(restorer, monkeypatch):
    shares = []
    failing(restorer, monkeypatch, 1)  # so one after the other
    restorer(
        torch.zeros(2, 3, 48, 40), 2, tile=64, tile_overlap=16, batch_size=2, on_tile=lambda *now: shares.append(now[2])
    )
    assert shares == [number / 16 for number in range(1, 17)], "2 x 2 windows in two evaluations, two images"


def test_memory_that_never_suffices_is_one_line(restorer, monkeypatch):
    failing(restorer, monkeypatch, 100)
    with pytest.raises(UserError, match=r"photo\.png: out of memory"):
        restorer(torch.zeros(1, 3, 32, 32), 2, keys=["photo.png"])


def test_other_errors_pass_through(restorer, monkeypatch):
    def broken(self, x, draw, **rest):
        raise RuntimeError("something else")

    monkeypatch.setattr(Restorer, "restore_latent", broken)
    with pytest.raises(RuntimeError, match="something else"):
        restorer(torch.zeros(1, 3, 8, 8), 2)


def test_not_a_number_runs_again_in_float32(tiny_model, monkeypatch):
    made = Restorer.load(str(tiny_model), device="cpu", precision="bf16")
    exact = Restorer.load(str(tiny_model), device="cpu", precision="fp32")
    original = Restorer.restore_latent

    def overflowing(self, x, draw, **rest):
        z = original(self, x, draw, **rest)
        return z if self.dtype == torch.float32 else z.index_fill(0, torch.tensor([1]), float("nan"))

    monkeypatch.setattr(Restorer, "restore_latent", overflowing)
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    result = made(x, 2, batch_size=2)
    assert result.isfinite().all()
    assert torch.allclose(result[1:], exact(x, 2)[1:], atol=0.05)
    assert {parameter.dtype for parameter in made.denoiser.parameters()} == {torch.bfloat16}


def test_not_a_number_never_comes_back(restorer, monkeypatch):
    nothing = torch.full((1, 4, 4, 4), float("nan"))
    monkeypatch.setattr(Restorer, "restore_latent", lambda self, x, draw, **rest: nothing)
    with pytest.raises(UserError, match=r"dark\.png"):
        restorer(torch.zeros(1, 3, 8, 8), 2, keys=["dark.png"])
