"""Stage 'rclip' against Eq. 3 (ConsisSR), written out: its loss, gradients and inputs."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import load_file
from torch import Tensor

from consissr.models.image_prompt import build_tower
from consissr.nano.config import run_config
from consissr.weights.find import find_model
from consissr.weights.image_encoder import load_tower, save_tower
from scripts.train import stage_builder
from tests.training import plain
from tests.training.conftest import VISION


def features(tower: VisionTransformer, x: Tensor) -> tuple[Tensor, Tensor]:
    """open_clip's pooled feature, and its patch tokens through the same norm and projection."""
    tokens = tower.ln_post(tower.transformer(tower._embeds(plain.seen_by_clip(x)))) @ tower.proj
    return tokens[:, 0], tokens[:, 1:]


def test_a_student_may_go_on_from_another_tower(base: Path, tmp_path: Path) -> None:
    """Its teacher stays the model's own; what it learnt is stored as an image tower."""
    torch.manual_seed(2)
    save_tower(tmp_path, build_tower(12, VISION))
    config = run_config(None, ["stage=rclip", f"model.base={base}", f"init={tmp_path}", "export_precision=fp16"])
    stage = stage_builder(config.stage)(config)
    for tower, folder in ((stage.student, tmp_path), (stage.teacher, base)):
        wanted = load_tower(folder)[0].state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in tower.state_dict().items())
    named = stage_builder("rclip")(run_config(None, ["stage=rclip", "model.base=nano", "init=nano-consissr"]))
    wanted = load_tower(find_model("nano-consissr"))[0].state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in named.student.state_dict().items()), "a known name"
    with torch.no_grad():
        stage.student.proj.add_(1)
    stage.export(tmp_path / "out")
    plain.close(load_tower(tmp_path / "out")[0].proj, stage.student.proj, 1e-3)
    (stored,) = (tmp_path / "out").rglob("*.safetensors")
    assert all(value.dtype == torch.float16 for value in load_file(stored).values() if value.is_floating_point())


@pytest.mark.parametrize(("tokens", "weight"), [("pooled", 0.0), ("patches", 0.25)])
def test_the_student_learns_what_the_teacher_says_of_the_photograph(base: Path, tokens: str, weight: float) -> None:
    words = ["stage=rclip", f"model.base={base}", f"model.image_tokens={tokens}", "rclip.patch_weight=0.25"]
    config = run_config(None, words)
    stage = stage_builder(config.stage)(config)
    (phase,) = stage.phases
    teacher = load_tower(base)[0]
    (student,) = (t for t in plain.members(stage.networks, VisionTransformer) if t.proj is phase.parameters["proj"])
    assert all(torch.equal(p, dict(teacher.named_parameters())[n]) for n, p in phase.parameters.items()), "a copy"
    assert {id(p) for p in phase.parameters.values()} == {id(p) for p in student.parameters()}
    with torch.no_grad():  # so that it is known which tower saw what
        for i, parameter in enumerate(phase.parameters.values()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    assert phase.name == "tower" and phase.optimizer is config.optimizer and stage.buffers == {}
    blocks = [*stage.teacher.transformer.resblocks, *student.transformer.resblocks]
    assert stage.compile_modules == blocks and len(blocks) == 4
    called = []
    for block in blocks:
        block.register_forward_hook(lambda block, *_: called.append(block))
    untouched = deepcopy(student.state_dict())

    batch = plain.recorded(3)
    others = [t for t in plain.members(stage.networks, VisionTransformer) if t is not student]
    with plain.watched(student=student.conv1, teacher=others[0].conv1) as given:
        found = plain.learnt(stage, phase, batch)
    assert called == blocks, "what is compiled is what is called"
    for name, image in (("student", batch.lq), ("teacher", batch.hq)):
        (call,) = given[name]
        plain.close(call["input"], plain.seen_by_clip(image))

    (pooled, patches), (pooled_hq, patches_hq) = features(student, batch.lq), features(teacher, batch.hq)
    # |RCLIP(x_LQ) - CLIP(x_HQ)|^2  (Eq. 3, ConsisSR), a mean over elements, not of normalised features
    loss = plain.mse(pooled, pooled_hq.detach()) + weight * plain.mse(patches, patches_hq.detach())
    plain.close(found["loss"], loss)
    plain.same_gradients(phase.parameters, loss)
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in untouched.items())
    assert stage.restore(batch) is None
