"""The batch jobs of post-training: one per stage, on the trainer's pool, whose commands and configs the code takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
import yaml

from editx.cli import data, evaluate, train
from services.trainer.core.configs import with_entries
from services.trainer.data.specs import Spec
from services.trainer.jobs import TrainingSettings, check_gate
from services.trainer.ppo.config import PpoConfig
from services.trainer.reward.trainer import RewardConfig
from services.trainer.settings import TrainerSettings
from services.trainer.sft.trainer import SftConfig

ROOT = Path(__file__).parents[2]
COMPONENT = ROOT / "k8s/components/training"
GROUPS = {"data": data.app, "train": train.app, "eval": evaluate.app}
STAGES = {"train-sft": "sft", "train-reward": "reward", "train-ppo": "ppo", "eval-run": "eval"}
SCRIPTS = {"data-build": "data", "data-preferences": "preferences"}
LITERALS = dict(
    literal.split("=", 1)
    for made in yaml.safe_load((COMPONENT / "kustomization.yaml").read_text())["configMapGenerator"]
    for literal in made.get("literals", [])
)


def arguments(stage: str) -> list[str]:
    """What the stage's pod calls, with the variables that Kubernetes puts in."""
    job: dict[str, Any] = yaml.safe_load((COMPONENT / f"{STAGES[stage]}.yaml").read_text())
    assert job["metadata"]["name"] == stage
    assert job["spec"]["suspend"], "a stage waits for the one before it"
    [container] = job["spec"]["template"]["spec"]["containers"]
    words = [re.sub(r"\$\((\w+)\)", lambda found: LITERALS[found[1]], word) for word in container["args"]]
    if words[0] == "torchrun":
        assert words[1:3] == ["--standalone", "--nproc-per-node=gpu"]
        return words[words.index("--module") + 2 :]
    return words[1:]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stages_command_is_one_that_the_command_line_takes(stage: str) -> None:
    assert parsed(arguments(stage)).params


def parsed(words: list[str]) -> click.Context:
    """A command line as the command takes it. Raises for one that it does not."""
    group, command, *options = words
    found = typer.main.get_command(GROUPS[group])
    assert isinstance(found, click.Group) or hasattr(found, "commands")
    return found.commands[command].make_context(command, list(options))  # type: ignore[union-attr,no-any-return]


def script(stage: str) -> list[list[str]]:
    """The commands of a stage that is a script, with the volume's paths, for the last part of a loop."""
    job: dict[str, Any] = yaml.safe_load((COMPONENT / f"{SCRIPTS[stage]}.yaml").read_text())
    assert job["metadata"]["name"] == stage
    assert job["spec"]["suspend"], "a stage waits for the one before it"
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["sh", f"/etc/editx/{SCRIPTS[stage]}.sh"]
    text = (COMPONENT / f"config/{SCRIPTS[stage]}.sh").read_text().replace("$part", "held-out")
    text = re.sub(r"\$([A-Z_]+)", lambda found: LITERALS[found[1]], text)
    return [line.split()[1:] for line in text.splitlines() if line.strip().startswith("editx ")]


@pytest.mark.parametrize("stage", SCRIPTS)
def test_the_commands_of_a_script_are_ones_that_the_command_line_takes(stage: str) -> None:
    assert all(parsed(words).params for words in script(stage))


def test_every_set_that_a_training_reads_is_made_by_a_stage() -> None:
    made: set[str] = set()
    for words in [*script("data-build"), *script("data-preferences")]:
        if words[:2] == ["data", "build"]:
            spec = Spec.model_validate(yaml.safe_load((COMPONENT / f"config/{Path(words[2]).name}").read_text()))
            made.add(spec.name)
        if words[:2] == ["data", "split"]:
            made |= {f"{Path(words[2]).name}-{part}" for part in ("train", "held-out")}
    made.add("preferences")  # the loop's first part
    read = {Path(value).name for name, value in LITERALS.items() if value.startswith("/training/datasets/")}
    assert read <= made
    assert LITERALS["EVAL_BENCHMARK"] == "/training/benchmark/cases.jsonl"


@pytest.mark.parametrize(("name", "default"), [("sft", SftConfig()), ("reward", RewardConfig()), ("ppo", PpoConfig())])
def test_a_stages_config_holds_entries_that_exist(name: str, default: Any) -> None:
    config = with_entries(default, yaml.safe_load((COMPONENT / f"config/{name}.yaml").read_text()))
    assert config.loop.sharding == "fsdp"
    assert config.loop.lr == default.loop.lr, "the paper's rates are the defaults"


@pytest.mark.parametrize(("file", "name"), [
    ("data", "sft"), ("prompts", "prompts"), ("preferences-train", "preferences"),
    ("preferences-held-out", "preferences-held-out"),
])  # fmt: skip
def test_a_data_sets_description_is_one_that_is_built(file: str, name: str) -> None:
    assert Spec.model_validate(yaml.safe_load((COMPONENT / f"config/{file}.yaml").read_text())).name == name


def test_each_stage_starts_from_what_the_one_before_it_published() -> None:
    published: list[str] = []
    for stage in ("train-sft", "train-reward", "train-ppo"):
        options = dict(word[2:].split("=", 1) for word in arguments(stage)[2:])
        used = {options["base"], options.get("reward", options["base"])}
        assert used <= {"/checkpoints/current", *published}
        published.append(options["publish"])
    assert LITERALS["EVAL_CHECKPOINT"] == published[-1]


@pytest.mark.parametrize("stage", ["train-sft", "train-reward", "train-ppo"])
def test_a_stage_publishes_behind_a_gate_that_it_measures(stage: str) -> None:
    _, recipe, *words = arguments(stage)
    options = dict(word[2:].split("=", 1) for word in words)
    name, _, least = options["gate"].partition("=")
    settings = TrainingSettings(base=options["base"], dataset=options["data"], held_out=options["held-out"],
                                gate={name: float(least)}, judge=options.get("judge"))  # fmt: skip
    check_gate(recipe, settings)


def test_the_trainer_of_the_compose_file_keeps_runs_and_publishes_where_others_read() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    settings = services["trainer"]["environment"]
    named = {name for name in settings if name.startswith("EDITX_TRAINER_")}
    assert named == {f"EDITX_TRAINER_{name}".upper() for name in TrainerSettings.model_fields}
    assert settings["EDITX_TRAINER_PUBLISH"] == settings["EDITX_CHECKPOINTS_DIR"]
    assert "training:/training" in services["trainer"]["volumes"]
    for reader in ("llm", "reward", "triton"):
        assert "training:/training:ro" in services[reader]["volumes"]


def test_stages_run_on_the_trainers_pool_with_a_gpu_and_keep_their_runs() -> None:
    pod = yaml.safe_load((COMPONENT / "pod.yaml").read_text())["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"editx.io/pool": "trainer"}
    [container] = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    claims = {volume["name"]: volume.get("persistentVolumeClaim") for volume in pod["volumes"]}
    for path in ("/training", "/checkpoints"):
        assert claims[mounts[path]["name"]]
        assert not mounts[path].get("readOnly")
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsUser"]
