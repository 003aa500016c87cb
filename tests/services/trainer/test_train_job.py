"""Training as a job on the bus: progress, measures, a gate before publishing, and going on elsewhere after a stop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from services.trainer import live
from services.trainer.core.configs import parse_assignments, read_config, with_entries
from services.trainer.data.manifest import collect
from services.trainer.handler import TrainHandler
from services.trainer.jobs import TrainingSettings, publish
from services.trainer.ppo.config import PpoConfig
from services.trainer.reward.trainer import RewardConfig, RewardTrainer
from services.trainer.settings import TrainerSettings
from services.trainer.sft.trainer import SftConfig, SftTrainer
from services.trainer.states import States
from shared.bus.memory import MemoryBus
from shared.checkpoints import Checkpoint
from shared.checkpoints.reward import load_reward
from shared.checkpoints.step1 import load_step1, load_text_tokenizer
from shared.checkpoints.verify import verify
from shared.errors import UserError
from shared.jobs import machine
from shared.jobs.memory import MemoryJobStore
from shared.publishing import publish_step
from shared.schemas import Job, JobRequest, JobState
from shared.schemas.request import TrainingRequest
from shared.store.folder import FolderStore
from tests.fixtures.tiny import with_reward
from tests.services.trainer.conftest import make_row
from tests.shared.worlds import World, until

LOOP = {"lr": 3e-3, "final_lr": 3e-4, "log_every": 1, "save_every": 1}
CONFIG = {"epochs": 2, "row_tokens": 1024, "rows_per_batch": 1, "loop": LOOP}
ROWS = [make_row(i) for i in range(8)]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(MemoryBus(), FolderStore(tmp_path / "store"), MemoryJobStore())
    yield world
    for worker, _ in world.workers:
        worker.stop()
    for _, thread in world.workers:
        thread.join(timeout=20)


def handler(world: World, tmp_path: Path, name: str, servers: str = "") -> TrainHandler:
    settings = TrainerSettings(runs=tmp_path / name, publish=tmp_path / "live", servers=servers)
    return TrainHandler(States(world.store), settings)


class Server:
    """A model server that notes what it is told to load."""

    def __init__(self, url: str, told: list[tuple[str, str]]) -> None:
        self.url, self.told = url, told

    def models(self) -> list[dict[str, str]]:
        model = "reward" if self.url.endswith(":2") else "llm"
        return [{"name": model, "state": "READY"}, {"name": "tokenizer", "state": ""}]

    def load(self, model: str) -> None:
        self.told.append((self.url, model))

    def close(self) -> None:
        pass


def submit(world: World, tiny: Path, recipe: str = "sft", rows=ROWS, **changes) -> Job:
    dataset = collect("train", rows).publish(world.store)
    settings = {"base": str(tiny), "dataset": dataset, "config": CONFIG, **changes}
    request = JobRequest(training=TrainingRequest(recipe=recipe, settings=settings), lane="batch")
    accepted = machine.accept(request, world.jobs.now())
    return publish_step(world.bus, world.jobs, world.jobs.create(accepted.job, accepted.events).job)


def test_a_job_trains_measures_and_publishes_behind_its_gate(
    world: World, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str]] = []
    monkeypatch.setattr(live, "open_inference", lambda url, _: Server(url, told))
    held_out = collect("held", [make_row(i) for i in range(60, 63)]).publish(world.store)
    world.work(
        handler(world, tmp_path, "a", "triton://127.0.0.1:1,triton://127.0.0.1:2,triton://127.0.0.1:3"), lease_s=20.0
    )
    job = world.wait_end(submit(world, tiny, held_out=held_out, publish="better", gate={"loss_gain": 0.5}))
    assert job.state == JobState.DONE, job.error
    assert job.timings[0].metrics["loss_gain"] > 0.5
    assert verify(Checkpoint(tmp_path / "live" / "better")).ok
    assert told == [("triton://127.0.0.1:1", "llm"), ("triton://127.0.0.1:3", "llm")]  # the second has no such model
    names = {info.key.rsplit("/", 1)[1] for info in world.store.list(f"jobs/{job.id}/")}
    assert names == {"measures.json", "log.jsonl", "curves.png", "published.json"}
    assert not list(world.store.list("training/"))


def test_a_gate_that_is_not_passed_publishes_nothing(world: World, tiny: Path, tmp_path: Path) -> None:
    held_out = collect("held", [make_row(60)]).publish(world.store)
    world.work(handler(world, tmp_path, "a", "triton://127.0.0.1:1"), lease_s=20.0)  # nobody listens, nobody asks
    job = world.wait_end(submit(world, tiny, held_out=held_out, publish="better", gate={"loss_gain": 99.0}))
    assert job.state == JobState.FAILED
    assert job.error is not None
    assert job.error.code == "gate_failed"
    assert not (tmp_path / "live" / "better").exists()


def test_another_worker_goes_on_where_a_drained_one_stopped(world: World, tiny: Path, tmp_path: Path) -> None:
    first = world.work(handler(world, tmp_path, "a"), lease_s=20.0, drain_s=0.0)
    job = submit(world, tiny, publish="moved")
    until(lambda: list(world.store.list("training/")))
    first.stop()
    world.workers[0][1].join(timeout=20)
    assert not world.jobs.get(job.id).is_terminal
    world.work(handler(world, tmp_path, "b"), lease_s=20.0)
    job = world.wait_end(job)
    assert job.state == JobState.DONE, job.error

    base = Checkpoint.resolve(tiny)
    whole = SftTrainer(load_step1(base, dtype=torch.float32), load_text_tokenizer(base), ROWS,
                       with_entries(SftConfig(), CONFIG), tmp_path / "whole")  # fmt: skip
    whole.train()
    moved = load_step1(Checkpoint(tmp_path / "live" / "moved"), dtype=torch.float32).state_dict()
    for name, tensor in whole.state().items():
        torch.testing.assert_close(moved[name], tensor, rtol=0, atol=0)


def test_a_cancelled_job_stops_at_its_next_step(world: World, tiny: Path, tmp_path: Path) -> None:
    world.work(handler(world, tmp_path, "a"), lease_s=20.0)
    job = submit(world, tiny, config=CONFIG | {"epochs": 200})
    until(lambda: list(world.store.list("training/")))
    machine.apply(world.jobs, job.id, machine.request_cancel)
    assert world.wait_end(job).state == JobState.CANCELLED


def test_reward_and_ppo_jobs_follow_each_other(world: World, tiny: Path, tmp_path: Path) -> None:
    world.work(handler(world, tmp_path, "a"), lease_s=20.0)
    pairs = [make_row(i, rejected=True, margin=9.0) for i in range(6)]
    config = {"pairs_per_batch": 3, "loop": LOOP}
    job = world.wait_end(submit(world, tiny, "reward", pairs, config=config, publish="judge"))
    assert job.state == JobState.DONE, job.error
    published = Checkpoint(tmp_path / "live" / "judge")
    assert verify(published).ok
    load_reward(published)
    config = {"steps": 2, "critic_warmup": 1, "prompts_per_step": 2, "samples_per_prompt": 1, "max_stretch": 0.5,
              "extra_groups": 1, "loop": LOOP}  # fmt: skip
    job = world.wait_end(submit(world, tiny, "ppo", ROWS[:3], config=config, reward=str(published.root), publish="ppo"))
    assert job.state == JobState.DONE, job.error
    assert verify(Checkpoint(tmp_path / "live" / "ppo")).ok


@pytest.mark.parametrize(("changes", "message"), [
    ({"rollouts": "engine"}, "no rollouts of the kind 'engine' here"),
    ({"rollouts": "pool"}, "the addresses of its servers"),
    ({"scores": "pool"}, "need its address"),
])  # fmt: skip
def test_a_worker_says_which_rollouts_it_does_not_have(
    changes: dict, message: str, world: World, tiny: Path, tmp_path: Path
) -> None:
    judge = tmp_path / "judge"
    RewardTrainer(load_step1(Checkpoint(tiny)), load_text_tokenizer(Checkpoint(tiny)), [make_row(0, rejected=True)],
                  RewardConfig(), tmp_path / "reward").save(Checkpoint(tiny), judge)  # fmt: skip
    world.work(handler(world, tmp_path, "a"), lease_s=20.0)
    job = world.wait_end(submit(world, tiny, "ppo", config={}, reward=str(judge), **changes))
    assert job.error is not None
    assert message in job.error.message


def test_a_judge_needs_a_server_that_decodes_for_it(world: World, tiny: Path, tmp_path: Path) -> None:
    held_out = collect("held", [make_row(60)]).publish(world.store)
    world.work(handler(world, tmp_path, "a", "triton://127.0.0.1:1"), lease_s=20.0)  # nobody listens, nobody asks
    scored = with_reward(tiny, tmp_path / "scored")
    job = world.wait_end(submit(world, tiny, "ppo", config={}, reward=str(scored), held_out=held_out, judge="j.json"))
    assert job.error is not None
    assert "A judge needs the models that decode" in job.error.message


@pytest.mark.parametrize(("changes", "message"), [
    ({"config": {"epoch": 1}}, "config.epoch is no entry of SftConfig"),
    ({"config": {"loop": {"lr": "fast"}}}, "config.loop.lr is 'fast', not float"),
    ({"colour": 1}, "colour"),
    ({"rollouts": "psychic"}, "rollouts"),
    ({"publish": "../up"}, "publish"),
])  # fmt: skip
def test_wrong_settings_fail_the_job_with_their_name(
    changes: dict, message: str, world: World, tiny: Path, tmp_path: Path
) -> None:
    world.work(handler(world, tmp_path, "a"), lease_s=20.0)
    job = world.wait_end(submit(world, tiny, **changes))
    assert job.state == JobState.FAILED
    assert job.error is not None
    assert message in job.error.message


def test_publishing_takes_the_old_ones_place(tmp_path: Path) -> None:
    settings = TrainingSettings(base="x", dataset="y", publish="live")
    for content in ("one", "two"):
        (tmp_path / "run" / "checkpoint").mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / "checkpoint" / "file").write_text(content)
        publish(settings, {}, tmp_path / "run", tmp_path / "target")
    assert (tmp_path / "target" / "live" / "file").read_text() == "two"
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["live"]


def test_entries_come_from_files_and_assignments(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("clip: 0.1\nloop:\n  lr: 1e-5\n")
    config = with_entries(PpoConfig(), read_config(tmp_path / "c.yaml"))
    assert (config.clip, config.loop.lr, config.loop.final_lr) == (0.1, 1e-5, 2e-7)
    entries = parse_assignments(["loop.lr=2e-5", "value_clip=null", "placement=end", "guards.kl=1"])
    config = with_entries(config, entries)
    assert (config.loop.lr, config.value_clip, config.placement, config.guards.kl) == (2e-5, None, "end", 1.0)
    with pytest.raises(UserError, match="placement is 'middle'"):
        with_entries(config, {"placement": "middle"})
    with pytest.raises(UserError, match="no assignment"):
        parse_assignments(["loop.lr"])
