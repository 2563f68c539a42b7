"""The shipped studies' files, their recorded results, and mistakes in calls of scripts/study.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from consissr.config.loading import changed_fields, load_config
from consissr.config.training import TrainConfig
from consissr.errors import UserError
from consissr.evaluation.tables import comparison, load_table
from consissr.inference import flags
from consissr.nano.config import run_config
from consissr.studies import run, spec

ROOT = Path(__file__).resolve().parents[2]
STUDIES, TABLES = ROOT / "configs" / "nano" / "studies", ROOT / "configs" / "tables"
NAMES = spec.available(STUDIES)


def variants(study: str) -> dict[str, TrainConfig]:
    return {path.stem: run_config(path) for path in sorted((STUDIES / study).glob("*.yaml"))}


@pytest.mark.parametrize("name", NAMES)
def test_variants_differ_only_where_the_study_says(name: str) -> None:
    study = spec.load_study(name, STUDIES)
    configs = variants(name)
    assert set(configs) == {row.train for row in study.rows.values()} - {""}, "every file is trained by a row"
    for variant, config in configs.items():
        assert config.output_dir == f"runs/studies/{name}/models/{variant}"
        assert f"study.py {name} --only {variant} " in (STUDIES / name / f"{variant}.yaml").read_text()
    for stage in {config.stage for config in configs.values()}:
        alike = [config for config in configs.values() if config.stage == stage]
        differing = {field for config in alike for field in changed_fields(alike[0], config, spec.PLACES)}
        assert differing <= {*study.vary, "seed"}


def test_all_studies_share_one_budget() -> None:
    """What is trained from the bundled base: equal steps, batch, optimiser and data over all studies."""
    configs = [config for name in NAMES for config in variants(name).values() if config.stage != "deft"]
    fields = ("steps", "batch", "micro_batch", "ema", "optimizer", "data", "init", "seed")
    for field in fields:
        assert all(getattr(config, field) == getattr(configs[0], field) for config in configs), field
    assert all(config.model.base == "nano" and config.model.residual == 0.5 for config in configs)
    shared = {"consissr_table4/gamma10": "consissr_table3/hpa_pooled", "ccsr_table1/v2": "hybrids/nuts_hpa_tala"}
    for one, other in shared.items():
        a, b = (variants(name.split("/")[0])[name.split("/")[1]] for name in (one, other))
        differ = changed_fields(a, b, spec.PLACES)
        assert all(field.startswith(("model.", "tala.", "nuts.l_diff_t")) for field in differ)


def test_a_second_seed_starts_from_the_second_seed_of_what_it_builds_on() -> None:
    plan = spec.Plan(STUDIES, Path("out"))
    assert plan.training("ccsr_table1", "full", 2).after == "ccsr_table1/v2-seed2"
    assert plan.training("ccsr_table1", "full").after == "ccsr_table1/v2"
    assert plan.training("hybrids", "deft_consissr", 9).after == "consissr_table4/gamma10"  # which has no seed 9
    assert list(plan.trainings("ccsr_table1", ["full"])) == [
        f"ccsr_table1/{name}" for name in ("v2", "full", "v2-seed2", "full-seed2")
    ]


@pytest.mark.parametrize("name", NAMES)
def test_studies_name_published_rows_and_known_models(name: str) -> None:
    from consissr.studies.scores import Published

    plan = spec.Plan(STUDIES, Path("out"))
    study = plan.study(name)
    published = Published(study, TABLES)
    for row in study.rows.values():
        assert plan.results(name, row.name)
        assert published.cells(row.name) or not row.published
    assert {"consissr_table4/gamma10", "consissr_table4/gamma10-seed2"} <= set(plan.trainings("consissr_table4", []))


def test_sampler_flags_are_those_of_infer_and_take_the_steps_they_claim() -> None:
    from ccsr import nuts_plan

    plan, checked = spec.Plan(STUDIES, Path("out")), 0
    for row in [row for name in NAMES for row in plan.study(name).rows.values()]:
        args = flags.parser("").parse_args(["-i", "x", *row.flags])
        if args.t_max is None:
            continue
        timesteps = [step.t for step in nuts_plan(args.steps, args.t_max, args.t_min)]
        if row.about.startswith("S = "):
            assert f"S = {len(timesteps)}" == row.about
            checked += 1
        if row.name in ("v1", "v1_truncated"):
            assert timesteps == {"v1": [999, 499], "v1_truncated": [999, 832]}[row.name]
    assert checked == 12


def test_the_tower_alone_comes_from_a_bundled_model() -> None:
    import torch

    from consissr.weights.files import find_model
    from consissr.weights.image_encoder import find_tower, load_tower

    config = variants("consissr_table4")["gamma10"].model
    found, own = find_tower(config).state_dict(), load_tower(find_model("nano-consissr"))[0].state_dict()
    base = find_tower(type(config)(base="nano")).state_dict()
    assert all(torch.equal(value, own[name]) for name, value in found.items())
    assert not all(torch.equal(value, base[name]) for name, value in found.items())


def test_a_model_without_image_tokens(tmp_path: Path) -> None:
    import torch

    from consissr.models.image_prompt import Adapter
    from consissr.weights.files import find_model, read_weights

    run.without_tokens(find_model("nano-consissr"), tmp_path / "blind")
    before, after = (
        read_weights(folder / "image_encoder" / "model.safetensors")
        for folder in (find_model("nano-consissr"), tmp_path / "blind")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"adapter.linear_3.weight", "adapter.linear_3.bias"}
    state = {name.removeprefix("adapter."): value.float() for name, value in after.items() if "adapter." in name}
    adapter = Adapter(state["linear_1.weight"].shape[1], state["linear_1.weight"].shape[0])
    adapter.load_state_dict(state)
    assert not adapter(torch.randn(2, 3, state["linear_1.weight"].shape[1])).any()
    with pytest.raises(UserError, match="no image prompt"):
        run.without_tokens(find_model("nano-ccsr"), tmp_path / "none")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["consissr_tabel4"], "unknown study 'consissr_tabel4'; did you mean 'consissr_table4'"),
        (["hybrids", "--train-only"], "give --photos"),
        (["hybrids", "--train-only", "--photos", "nowhere"], "--photos nowhere has no folder train/"),
        (["hybrids", "--only", "nuts_hpa_tala", "deft_consisr", "--train-only"], "did you mean 'deft_consissr'"),
        (["hybrids", "--only", "nothing", "--train-only"], "has a row nothing; known: ccsr_v2"),
    ],
)
def test_mistakes_in_a_call_are_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    call = [sys.executable, str(ROOT / "scripts" / "study.py"), *words, "-o", str(tmp_path)]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and message in done.stderr


def test_every_study_is_recorded() -> None:
    assert {path.stem for path in (TABLES / "nano").glob("*.yaml")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_recorded_results_are_those_of_the_study(name: str) -> None:
    """Fails where a study's file was changed without a new `study.py --tables configs/tables/nano`."""
    study, table = spec.load_study(name, STUDIES), load_table(f"nano/{name}", TABLES)
    assert set(table.datasets) == set(spec.DATASETS)
    for dataset, rows in table.datasets.items():
        assert "recorded" in comparison(table, dataset, {})
        own = {row for row in rows if not row.endswith(", published")}
        assert own == {*study.rows, "bicubic", "bicubic+grain"}
        recorded = {
            (f["first"], f["second"], f["metric"], f["expected"], f["claim"], f["source"])
            for f in table.findings
            if f["dataset"] == dataset and " at t" not in f["metric"]
        }
        assert recorded == {
            (*c.rows, metric, expected, c.claim, c.source)
            for c in study.comparisons
            for metric, expected in c.expect.items()
        }
    words = {f["verdict"].removesuffix(" (one training seed)") for f in table.findings}
    assert words <= {"appears", "opposite", "not resolved"}


def test_every_job_is_a_call_that_its_script_understands(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the scripts' own parsers: the jobs of a study whose variants build on others', with nothing done yet, and
    the flags of every study's rows.
    """
    for part in ("train", "val"):
        (tmp_path / "photos" / part).mkdir(parents=True)
    (tmp_path / "out" / "data" / "realsr").mkdir(parents=True)
    plan = spec.Plan(STUDIES, tmp_path / "out")
    setting = run.Setting(plan=plan, scripts=ROOT / "scripts", photos=tmp_path / "photos", overrides=["steps=2"])
    train, infer, testset = script("train"), script("infer"), script("make_testset")
    told: list[TrainConfig] = []

    def note(kind: type, path: str, words: list[str]) -> None:
        told.append(load_config(kind, path, words))
        raise UserError("that is enough")

    monkeypatch.setattr(train, "load_config", note)
    parser, repeats = flags.parser(""), plan.study("hybrids").repeats
    jobs = run.data_jobs(setting) + run.training_jobs(setting, plan.trainings("hybrids", []))
    jobs += run.restoring_jobs(setting, "hybrids", plan.chosen("hybrids", []), [job.name for job in jobs])
    found = set()
    for job in jobs:
        name, words = Path(job.command[1]).name, job.command[2:]
        found.add(name)
        if name == "train.py":
            assert train.main(words) == 2 and told[-1].steps == 2, job.name
            assert told[-1].data.paths == [str(tmp_path / "photos" / "train")]
        elif name == "infer.py":
            parsed = parser.parse_args(words)
            infer.sampler_settings(parsed)
            assert parsed.repeat == repeats, job.name
        else:
            assert testset.parser().parse_args(words).count == run.PHOTOS["count"]
    assert found == {"train.py", "infer.py", "make_testset.py"}
    for row in (row for name in NAMES for row in plan.study(name).rows.values()):
        infer.sampler_settings(parser.parse_args(["-i", "in", "-o", "out", *row.flags]))
