"""`compile=true`: the same training. Compiling takes a minute."""

from __future__ import annotations

from pathlib import Path

import pytest

from consissr.training.run_log import read_log
from scripts.train import main
from tests.training.tiny import beside, words


@pytest.mark.slow
def test_compiled_networks_tune_the_decoder_alike(
    runs: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the third step on the adaptive weight goes backward through graphs that were compiled for a single use."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # what other runs compiled shall not count
    logs = []
    for word in ("false", "true"):
        folder = beside(runs, tmp_path / word, "deft")
        more = ("deft.adversarial_start=1", "steps=3", "checkpoint_every=3")
        assert main(words("deft", photos, folder, f"compile={word}", *more)) == 0
        logs.append(read_log(folder / "deft/log.jsonl"))
    assert [("decoder/adaptive" in line) for line in logs[0]] == [False, False, True]
    for plain, compiled in zip(*logs, strict=True):
        for name in {"decoder/adaptive", "decoder/loss", "decoder/grad_norm", "discriminator/loss"} & plain.keys():
            assert compiled[name] == pytest.approx(plain[name], rel=1e-2), name
