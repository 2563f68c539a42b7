"""Runs that start from a trained model (`init`): what of it stays, what is refused, what is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from consissr import Restorer
from consissr.errors import UserError
from consissr.weights.base import load_text
from consissr.weights.folder import save_prompts
from tests.training.variants import DDPM, VARIANTS, frozen, loop, two_steps


def test_a_run_goes_on_with_its_models_base_or_another(base: Path, photos: Path, tmp_path: Path) -> None:
    """And with the empty prompt, whichever ones the model restores with."""
    words, model = VARIANTS["pre-training"], tmp_path / "model"
    loop(base, photos, tmp_path / "a", *words).stage.export(model)
    stored = yaml.safe_load((model / "config.yaml").read_text())
    stored["model"]["base"], stored["sampler"]["positive"], stored["sampler"]["negative"] = "./base", "clean", "blurred"
    (model / "config.yaml").write_text(yaml.safe_dump(stored))
    shutil.copytree(base, model / "base")
    for given, wanted in (("sd21-base", f"{model}/base"), (str(base), str(base))):
        stage = loop(base, photos, tmp_path / "b", *words, f"init={model}", f"model.base={given}").stage
        assert Path(stage.model.config.model.base) == Path(wanted)
        assert torch.equal(stage.text, load_text(base).encode([""]))


def test_a_model_of_stored_prompts_is_not_trained_for_others(base: Path, photos: Path, tmp_path: Path) -> None:
    words = VARIANTS["pre-training"]
    loop(base, photos, tmp_path / "a", *words).stage.export(tmp_path / "model")
    save_prompts(tmp_path / "model", {"": torch.zeros(1, 8, 8), "clean": torch.ones(1, 8, 8)})
    given = [*words, f"init={tmp_path}/model"]
    for prompts in (["sampler.positive=sharp"], ["sampler.negative=blurred", "sampler.guidance=2"]):
        with pytest.raises(UserError, match=r"keeps the prompts \['', 'clean'\] alone: '(sharp|blurred)' of sampler"):
            loop(base, photos, tmp_path / "b", *given, *prompts)
    loop(base, photos, tmp_path / "b", *given, "sampler.positive=clean", "sampler.negative=blurred")  # unguided


def test_a_trained_adapter_goes_on(base: Path, photos: Path, tmp_path: Path) -> None:
    """Neither the settings of an earlier run nor of a converted release may cost a trained adapter."""
    first = loop(base, photos, tmp_path / "a", *VARIANTS["consissr"])
    two_steps(first)
    first.stage.export(tmp_path / "model")
    for inits in ("default", "as_released"):
        words = [*VARIANTS["consissr"], f"init={tmp_path}/model", f"model.adapter_init={inits}"]
        found = loop(base, photos, tmp_path / inits, *words).stage.image_prompt.state_dict()
        same = {n for n, value in first.stage.image_prompt.state_dict().items() if torch.equal(value, found[n])}
        assert same == found.keys(), inits


def test_the_decoder_of_a_consissr_model_can_be_tuned(base: Path, photos: Path, tmp_path: Path) -> None:
    """Whatever timesteps it samples at: the first stage's losses are not trained here."""
    first = loop(base, photos, tmp_path / "a", *VARIANTS["consissr"], "sampler.steps=5")
    first.stage.export(tmp_path / "model")
    words = ["stage=nano_deft", f"init={tmp_path}/model", "tala.probability=power"]  # as in the hybrid's own file
    with pytest.raises(UserError, match="config.yaml: leave out model.hint, sampler.steps"):
        loop(base, photos, tmp_path / "b", *words, "model.hint=stack", "sampler.steps=3")
    run = loop(base, photos, tmp_path / "b", *words, "deft.discriminator_width=8", "deft.adversarial_start=-1")
    before = {key: p.clone() for key, p in frozen(run).items()}
    missed = run.weights().keys() - two_steps(run)
    assert not {name for name in missed if name.startswith("decoder/")}
    assert all(torch.equal(value, frozen(run)[key]) for key, value in before.items())
    run.stage.export(tmp_path / "tuned")
    out = Restorer.load(str(tmp_path / "tuned"), device="cpu")(torch.zeros(1, 3, 10, 12), scale=2)
    assert out.isfinite().all()


def test_a_plainer_model_than_init_is_named(base: Path, photos: Path, tmp_path: Path) -> None:
    words = ["stage=tala", *DDPM]
    loop(base, photos, tmp_path / "a", *words, "model.position_embedding=8", "model.hint=stack").stage.export(
        tmp_path / "m"
    )
    with pytest.raises(
        UserError, match=r"leaves out or does otherwise: use model.hint=stack model.position_embedding=8"
    ):
        loop(base, photos, tmp_path / "b", *words, f"init={tmp_path}/m")
