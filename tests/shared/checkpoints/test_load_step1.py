"""The language model loads from the published layout, whole or in shards, and says what is wrong with a bad one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.checkpoints import Checkpoint, InvalidCheckpoint
from shared.checkpoints.step1 import load_step1, load_text_tokenizer
from shared.errors import MissingComponent
from shared.models.quantize import HalfLinear, Int8Linear

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "step1_small"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "Step-Audio-EditX"
    shutil.copytree(GOLDEN, target, ignore=shutil.ignore_patterns("io.safetensors"))
    return target


def load(folder: Path, **options: object) -> torch.nn.Module:
    return load_step1(Checkpoint.resolve(folder.parent), **{"dtype": torch.float32, **options})  # type: ignore[arg-type]


def expect_golden(model: torch.nn.Module) -> None:
    golden = load_file(GOLDEN / "io.safetensors")
    with torch.no_grad():
        _, logits = model(golden["input_ids"])
    torch.testing.assert_close(logits, golden["logits"], atol=2e-4, rtol=0)


def test_a_single_file_loads(folder: Path) -> None:
    expect_golden(load(folder))


def test_shards_with_an_index_load(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    shards = {"model-00001.safetensors": {}, "model-00002.safetensors": {}}
    for place, (name, tensor) in enumerate(tensors.items()):
        shards[f"model-0000{place % 2 + 1}.safetensors"][name] = tensor
    for name, part in shards.items():
        save_file(part, folder / name)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    expect_golden(load(folder))


def test_int8_replaces_every_linear_layer_and_keeps_the_embedding(folder: Path) -> None:
    model = load(folder, quantize="int8", dtype=torch.bfloat16)
    assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) == 3 * 7 + 1
    assert model.dtype == torch.bfloat16


def test_float16_weights_are_joined_where_they_read_the_same_and_change_nothing_else(folder: Path) -> None:
    rounded = {name: tensor.half().float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(rounded, folder / "model.safetensors")
    exact, packed = load(folder), load(folder, quantize="half")
    assert not any(isinstance(module, torch.nn.Linear) for module in packed.modules())
    assert sum(isinstance(module, HalfLinear) for module in packed.modules()) == 3 * 4 + 1
    ids = load_file(GOLDEN / "io.safetensors")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(packed(ids), exact(ids), atol=1e-4, rtol=0)


def rewrite(folder: Path, change: object) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, folder / "model.safetensors")


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(InvalidCheckpoint, match=r"lacks 1 tensors: model\.norm\.weight"):
        load(folder)


def test_an_unknown_tensor_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(InvalidCheckpoint, match="1 unknown tensors: extra"):
        load(folder)


def test_a_tensor_of_another_size_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(7, 96)}))
    with pytest.raises(InvalidCheckpoint, match=r"lm_head\.weight is \(7, 96\), config\.json makes it \(512, 96\)"):
        load(folder)


def test_a_quantised_release_is_refused_with_what_to_use(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight_packed": torch.zeros(1)}))
    with pytest.raises(InvalidCheckpoint, match="Use the bf16 release"):
        load(folder)


def test_a_config_without_a_size_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    with pytest.raises(InvalidCheckpoint, match=r"config\.json lacks a size"):
        load(folder)
    for text in ("{", "[]"):
        (folder / "config.json").write_text(text)
        with pytest.raises(InvalidCheckpoint, match=r"config\.json"):
            load(folder)


def test_missing_weights_and_tokenizer_are_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingComponent, match=r"model\.safetensors"):
        load(folder)
    with pytest.raises(MissingComponent, match=r"tokenizer\.model"):
        load_text_tokenizer(Checkpoint.resolve(folder.parent))
