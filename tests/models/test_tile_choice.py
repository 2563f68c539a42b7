"""How large tiles are: by image, memory and networks."""

from types import SimpleNamespace

import torch

from consissr.config.sampler import SamplerConfig
from consissr.models import memory, tiles
from consissr.models.tiles import Needs, Tiles, choose_tiles, evenly


def test_chosen_tiles():
    def choose(size, memory=2**34, one_size=False, trained=64, vae_bytes=2**18, on_cpu=False, fixed=False, **settings):
        needs = Needs(trained, one_size, 4, 2**17, vae_bytes, fixed)
        return choose_tiles(SamplerConfig(**settings), size, 8, needs, memory, on_cpu)

    whole = ((0, 0), (0, 0), 0)
    for size in ((64, 64), (64, 90)):
        assert choose(size) == Tiles(*whole)
    assert choose((64, 90), one_size=True) == Tiles((64, 64), (48, 48), 0)
    # Windows of about 64 that overlap by 8 share 200 evenly: round(192 / 56) = 3 of 72, (200 + 16) / 3
    assert choose((64, 90), one_size=True, trained=16) == Tiles(*whole)
    for trained in (64, 0, 16):  # what a configuration does not say, or says of small crops, costs nothing
        assert choose((200, 200), trained=trained).diffusion == (72, 72)
        assert choose((200, 60), trained=trained).diffusion == (72, 60)
    for size in ((200, 200), (130, 90), (96, 300)):  # one shape for all, where shapes are recorded
        windows = choose(size, fixed=True)
        assert windows.diffusion == (64, 64) and 48 <= windows.stride[0] == windows.stride[1] < 64
    assert choose((200, 200)).vae > 0
    assert choose((100, 100), memory=2**28).vae >= 16
    assert choose((200, 200), tile=0, vae_tile=0) == Tiles(*whole)
    assert choose((200, 200), tile=512, tile_overlap=256, vae_tile=400) == Tiles((64, 64), (32, 32), 50)
    # The autoencoder on the CPU: in one piece below 2048 x 2048 pixels; sampled where 64 patches of 48 x 48 fit
    assert choose((256, 255), vae_bytes=2**12, on_cpu=True).vae == 0
    large = choose((256, 256), vae_bytes=2**12, on_cpu=True)
    assert (large.vae, large.vae_tiling) == (128, "sampled")
    assert choose((200, 200)).vae_tiling == "exact"
    assert [choose((300, 300), memory=2**36, on_cpu=on_cpu).vae for on_cpu in (True, False)] == [64, 128]
    assert Tiles().smaller(64, 48) == Tiles((32, 32), (24, 24), 32)
    assert Tiles((16, 16), (12, 12), 16).smaller(64, 64) is None


def test_even_windows():
    for length in range(20, 500, 7):
        side, stride = evenly(length, 64, 8, 4)
        number = -(-(length - side) // stride) + 1
        assert side % 4 == 0 and side >= min(length, 43) and (number - 1) * stride + side - length < 4 * number


def test_a_learned_position_embedding_asks_for_windows_of_its_size():
    """ConsisSR's is for 64x64 latents: larger images are worked on in windows of 64."""
    unet = torch.nn.Module()
    unet.config = SimpleNamespace(sample_size=64, block_out_channels=(8, 8))
    unet.attn1 = torch.nn.Module()
    latents = SimpleNamespace(factor=8, patch=1, vae=SimpleNamespace(config=SimpleNamespace(block_out_channels=(8, 8))))
    windows = []
    for position in (torch.zeros(1), torch.zeros(64, 4)):
        name = "position_emb" if len(position) > 1 else "weight"  # as models/attention.py names it
        unet.attn1.register_parameter(name, torch.nn.Parameter(position))
        chosen = tiles.tiles_for(
            SamplerConfig(), SimpleNamespace(unet=unet), latents, (512, 720), 1, torch.device("cpu")
        )
        windows.append(chosen.diffusion)
    assert windows == [(0, 0), (64, 64)]


def test_a_containers_limit_is_the_memory_there_is(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    limit.write_text("123456789\n")
    monkeypatch.setattr(memory, "CGROUP_LIMITS", (str(tmp_path / "none"), str(limit)))
    assert memory.total_memory(torch.device("cpu")) == 123456789
    limit.write_text("max\n")
    assert memory.total_memory(torch.device("cpu")) > 2**30
