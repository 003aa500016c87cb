import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shared.checkpoints import manifest
from shared.checkpoints.layout import (
    DECODER_FOLDER,
    EDITX_FOLDER,
    LINGUISTIC_FOLDER,
    TOKENIZER_FOLDER,
    Checkpoint,
    InvalidCheckpoint,
)
from shared.checkpoints.recognizer import load_recognizer, save_recognizer
from shared.checkpoints.verify import Report, verify
from shared.models.recognizer import Recognizer, RecognizerConfig
from tests.fixtures.tiny import with_reward

DECODER = f"{EDITX_FOLDER}/{DECODER_FOLDER}"
LINGUISTIC = f"{TOKENIZER_FOLDER}/{LINGUISTIC_FOLDER}"
LANGUAGE_MODEL = f"{EDITX_FOLDER}/model.safetensors"


@pytest.fixture
def root(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "checkpoint"))


def check(root: Path) -> Report:
    return verify(Checkpoint.resolve(root))


def findings(report: Report) -> dict[str, list[str]]:
    return {
        part.name: [f"{finding.problem} {finding.what} {finding.detail}".strip() for finding in part.findings]
        for part in report.components
        if not part.ok
    }


def change_state(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    change(state)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)


def test_a_complete_checkpoint_has_no_findings(tiny: Path) -> None:
    report = check(tiny)
    assert findings(report) == {}
    assert report.ok
    sizes = {part.name: part.tensors for part in report.components}
    assert sizes["language model"] == 2 * 9 + 3
    assert json.loads(json.dumps(report.document()))["ok"] is True


@pytest.mark.parametrize(
    ("name", "component"),
    [
        (LANGUAGE_MODEL, "language model"),
        (f"{EDITX_FOLDER}/config.json", "language model"),
        (f"{EDITX_FOLDER}/tokenizer.model", "text tokenizer"),
        (f"{DECODER}/cosyvoice.yaml", "flow"),
        (f"{DECODER}/flow.pt", "flow"),
        (f"{DECODER}/hift.pt", "vocoder"),
        (f"{DECODER}/campplus.onnx", "speaker encoder"),
        (f"{LINGUISTIC}/config.yaml", "linguistic encoder"),
        (f"{LINGUISTIC}/am.mvn", "linguistic encoder"),
        (f"{LINGUISTIC}/model.safetensors", "linguistic encoder"),
        (f"{TOKENIZER_FOLDER}/linguistic_tokenizer.npy", "linguistic encoder"),
        (f"{TOKENIZER_FOLDER}/speech_tokenizer_v1.onnx", "semantic tokenizer"),
    ],
)
@pytest.mark.parametrize("damage", ["removed", "truncated", "html"])
def test_a_missing_or_damaged_file_is_a_finding_of_its_component(
    root: Path, name: str, component: str, damage: str
) -> None:
    path = root / name
    if damage == "removed":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"<html>404</html>")
    found = findings(check(root))
    assert component in found
    assert found[component][0].startswith("missing" if damage == "removed" else "wrong")
    if damage == "removed":
        assert Path(name).name.split(".")[0] in found[component][0]


def test_missing_extra_and_wrong_tensors_are_told_apart(root: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state["surplus.weight"] = state.pop("model.norm.weight")
        state["lm_head.weight"] = state["lm_head.weight"][:, :8].contiguous()

    change_state(root / LANGUAGE_MODEL, change)
    assert findings(check(root)) == {
        "language model": [
            "extra surplus.weight float32 [48]",
            "missing model.norm.weight float32 [48]",
            "wrong lm_head.weight shape [5530, 8], expected [5530, 48]",
        ]
    }


def test_half_precision_is_right_and_integers_are_wrong(root: Path) -> None:
    change_state(root / LANGUAGE_MODEL, lambda state: state.update({k: v.bfloat16() for k, v in state.items()}))
    assert findings(check(root)) == {}
    change_state(
        root / DECODER / "flow.pt",
        lambda state: state.update({"encoder_proj.bias": state["encoder_proj.bias"].to(torch.int8)}),
    )
    assert findings(check(root))["flow"] == [
        "wrong encoder_proj.bias type int8, expected float32 or bfloat16 or float16"
    ]


def test_a_pickle_with_code_is_refused_and_not_run(root: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {tmp_path / 'run'}",)

    torch.save({"a": Attack()}, root / DECODER / "hift.pt")
    found = findings(check(root))["vocoder"]
    assert "holds code" in found[0]
    assert not (tmp_path / "run").exists()


def test_a_git_lfs_pointer_is_named_as_one(root: Path) -> None:
    (root / LANGUAGE_MODEL).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "Git LFS pointer" in findings(check(root))["language model"][0]


def test_weight_norm_in_the_file_is_folded_before_comparing(root: Path) -> None:
    def split(state: dict[str, torch.Tensor]) -> None:
        weight = state.pop("conv_pre.weight")
        state["conv_pre.parametrizations.weight.original0"] = weight.flatten(1).norm(dim=1).view(-1, 1, 1)
        state["conv_pre.parametrizations.weight.original1"] = weight

    change_state(root / DECODER / "hift.pt", split)
    assert findings(check(root)) == {}


def test_decoder_and_predictor_tensors_of_the_full_linguistic_model_are_allowed(root: Path) -> None:
    change_state(
        root / LINGUISTIC / "model.safetensors",
        lambda state: state.update({"predictor.cif_output.bias": torch.zeros(1)}),
    )
    assert findings(check(root)) == {}


def test_shards_are_read_together_and_compared_with_the_index(root: Path) -> None:
    state = load_file(root / LANGUAGE_MODEL)
    (root / LANGUAGE_MODEL).unlink()
    names = sorted(state)
    first, second = names[::2], names[1::2]
    save_file({name: state[name] for name in first}, root / EDITX_FOLDER / "model-00001.safetensors")
    save_file({name: state[name] for name in second}, root / EDITX_FOLDER / "model-00002.safetensors")
    where = dict.fromkeys(first, "model-00001.safetensors") | dict.fromkeys(second, "model-00002.safetensors")
    index = root / EDITX_FOLDER / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert findings(check(root)) == {}
    index.write_text(json.dumps({"weight_map": where | {first[0]: "model-00002.safetensors"}}))
    assert findings(check(root))["language model"] == [
        f"wrong {first[0]} the index says model-00002.safetensors, it is in model-00001.safetensors"
    ]


def test_a_vocabulary_larger_than_the_language_model_is_wrong(root: Path) -> None:
    config = root / EDITX_FOLDER / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"vocab_size": 100}))
    assert "5530 pieces" in findings(check(root))["text tokenizer"][0]


def test_a_config_without_a_size_names_it(root: Path) -> None:
    (root / EDITX_FOLDER / "config.json").write_text('{"hidden_size": 48}')
    assert "intermediate_size" in findings(check(root))["language model"][0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_attention_heads", 0),
        ("num_attention_groups", -2),
        ("num_hidden_layers", None),
        ("vocab_size", "x"),
        ("rms_norm_eps", -1),
    ],
)
def test_a_size_that_is_no_positive_number_names_it(root: Path, name: str, value: object) -> None:
    config = root / EDITX_FOLDER / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {name: value}))
    assert f"{name} is {value!r}" in findings(check(root))["language model"][0]


def test_a_config_that_is_no_object_is_wrong_for_what_reads_it(root: Path) -> None:
    (root / EDITX_FOLDER / "config.json").write_text("5")
    found = findings(check(root))
    assert set(found) >= {"language model", "flow", "vocoder"}
    assert all("holds no JSON object" in part[0] for part in found.values())


def test_a_file_that_cannot_be_read_is_wrong(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path, **_: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_text", closed)
    assert "cannot be read: Permission denied" in findings(check(root))["language model"][0]


@pytest.mark.parametrize(
    ("name", "old", "new", "component"),
    [
        (f"{DECODER}/cosyvoice.yaml", "num_mels: 80", "num_mels: 40", "flow"),
        (f"{DECODER}/cosyvoice.yaml", "n_fft: 1920", "n_fft: 0", "flow"),
        (f"{LINGUISTIC}/config.yaml", "lfr_n: 6", "lfr_n: 4", "linguistic encoder"),
    ],
)
def test_settings_that_the_front_end_cannot_follow_are_wrong(
    root: Path, name: str, old: str, new: str, component: str
) -> None:
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new))
    assert component in findings(check(root))


def test_centroids_of_another_shape_are_wrong(root: Path) -> None:
    np.save(root / TOKENIZER_FOLDER / "linguistic_tokenizer.npy", np.zeros((1024, 31), np.float32))
    assert "expected float32 [1024, 32]" in findings(check(root))["linguistic encoder"][0]


def test_exchanged_graphs_are_wrong(root: Path) -> None:
    semantic, speaker = root / TOKENIZER_FOLDER / "speech_tokenizer_v1.onnx", root / DECODER / "campplus.onnx"
    shutil.copy(speaker, semantic)
    assert findings(check(root))["semantic tokenizer"][0].startswith("missing input 1")


def test_hashes_are_compared_when_there_is_a_list(root: Path) -> None:
    manifest.write(root, {name: manifest.sha256(root / name) for name in (LANGUAGE_MODEL, f"{DECODER}/flow.pt")})
    assert findings(check(root)) == {}
    change_state(root / DECODER / "flow.pt", lambda state: state["encoder_proj.bias"].add_(1))
    assert findings(check(root))["hashes"][0].startswith(f"wrong {DECODER}/flow.pt sha256")
    assert findings(verify(Checkpoint.resolve(root), hashes=False)) == {}


def test_a_reward_model_is_checked_where_there_is_one(root: Path, tmp_path: Path) -> None:
    judged = with_reward(root, tmp_path / "judged")
    assert "reward model" in {component.name for component in check(judged).components}
    assert findings(check(judged)) == {}
    save_file({"weight": torch.zeros(1, 7), "bias": torch.zeros(1)}, judged / "reward" / "reward_head.safetensors")
    found = findings(check(judged))["reward model"]
    assert "wrong weight shape [1, 7], expected [1, 48]" in found
    assert any(line.startswith("missing mean") for line in found)


def test_a_recogniser_is_checked_where_there_is_one(root: Path) -> None:
    file = root / "recognizer.safetensors"
    save_recognizer(Recognizer(RecognizerConfig(size=16, num_blocks=1, attention_heads=2, linear_units=24)), file)
    report = check(root)
    assert report.ok
    assert "recogniser" in {component.name for component in report.components}
    with safe_open(file, framework="pt") as opened:
        facts = opened.metadata()
    state = load_file(file)
    del state["head.bias"]
    save_file(state, file, metadata=facts)
    assert findings(check(root)) == {"recogniser": ["missing head.bias float32 [29]"]}
    save_file(state, file)
    assert "no recogniser" in findings(check(root))["recogniser"][0]
    with pytest.raises(InvalidCheckpoint):
        load_recognizer(Checkpoint.resolve(root))
