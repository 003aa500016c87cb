import json
import subprocess
import sys
from pathlib import Path

import pytest

from shared.checkpoints.layout import (
    DECODER_FOLDER,
    EDITX_FOLDER,
    LINGUISTIC_FOLDER,
    TOKENIZER_FOLDER,
    Checkpoint,
    InvalidCheckpoint,
    Metadata,
    MissingCheckpoint,
    TrainedOn,
)
from shared.errors import MissingComponent
from shared.schemas.edit import Edit

FILES = {
    "step1_dir": (EDITX_FOLDER, "config.json"),
    "text_tokenizer_file": (EDITX_FOLDER, "tokenizer.model"),
    "cosyvoice_yaml": (EDITX_FOLDER, f"{DECODER_FOLDER}/cosyvoice.yaml"),
    "flow_file": (EDITX_FOLDER, f"{DECODER_FOLDER}/flow.pt"),
    "vocoder_file": (EDITX_FOLDER, f"{DECODER_FOLDER}/hift.pt"),
    "speaker_onnx": (EDITX_FOLDER, f"{DECODER_FOLDER}/campplus.onnx"),
    "linguistic_dir": (TOKENIZER_FOLDER, f"{LINGUISTIC_FOLDER}/config.yaml"),
    "linguistic_file": (TOKENIZER_FOLDER, f"{LINGUISTIC_FOLDER}/model.pt"),
    "linguistic_cmvn_file": (TOKENIZER_FOLDER, f"{LINGUISTIC_FOLDER}/am.mvn"),
    "centroids_file": (TOKENIZER_FOLDER, "linguistic_tokenizer.npy"),
    "semantic_onnx": (TOKENIZER_FOLDER, "speech_tokenizer_v1.onnx"),
}


def lay_out(root: Path, *, nested: bool) -> Path:
    for folder, name in [*FILES.values(), (EDITX_FOLDER, "model.safetensors")]:
        path = root / folder / name if nested else root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


@pytest.mark.parametrize("nested", [True, False], ids=["both folders in one root", "flat"])
@pytest.mark.parametrize("component", FILES)
def test_every_component_is_found(tmp_path: Path, component: str, nested: bool) -> None:
    checkpoint = Checkpoint.resolve(lay_out(tmp_path, nested=nested))
    folder, name = FILES[component]
    expected = checkpoint.root / folder / name if nested else checkpoint.root / name
    assert getattr(checkpoint, component) == (expected.parent if component.endswith("_dir") else expected)


def test_the_language_model_folder_with_the_tokenizer_beside_it_is_a_checkpoint(tmp_path: Path) -> None:
    lay_out(tmp_path, nested=True)
    checkpoint = Checkpoint.resolve(tmp_path / EDITX_FOLDER)
    assert checkpoint.flow_file.is_file()
    assert checkpoint.semantic_onnx == (tmp_path / TOKENIZER_FOLDER / "speech_tokenizer_v1.onnx").resolve()


def test_safetensors_come_before_pickles(tmp_path: Path) -> None:
    lay_out(tmp_path, nested=True)
    (tmp_path / EDITX_FOLDER / DECODER_FOLDER / "flow.safetensors").touch()
    assert Checkpoint.resolve(tmp_path).flow_file.name == "flow.safetensors"


def test_the_weight_index_names_the_shards(tmp_path: Path) -> None:
    folder = lay_out(tmp_path, nested=True) / EDITX_FOLDER
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}}))
    (folder / "model-00001.safetensors").touch()
    with pytest.raises(MissingComponent, match=r"model-00002\.safetensors"):
        _ = Checkpoint.resolve(tmp_path).step1_files
    (folder / "model-00002.safetensors").touch()
    assert [path.name for path in Checkpoint.resolve(tmp_path).step1_files] == [
        "model-00001.safetensors",
        "model-00002.safetensors",
    ]
    index.write_text("[]")
    with pytest.raises(InvalidCheckpoint, match=r"index\.json"):
        _ = Checkpoint.resolve(tmp_path).step1_files


def test_a_missing_file_is_named_with_the_places_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(MissingComponent) as caught:
        _ = Checkpoint.resolve(tmp_path).flow_file
    assert "flow.safetensors or flow.pt" in str(caught.value)
    assert str(tmp_path / DECODER_FOLDER / "flow.pt") in str(caught.value)
    assert "editx checkpoint verify" in str(caught.value)


def test_a_name_is_looked_up_among_the_fetched_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDITX_CHECKPOINTS_DIR", str(tmp_path))
    lay_out(tmp_path / "official", nested=True)
    assert Checkpoint.resolve("official").root == (tmp_path / "official").resolve()
    with pytest.raises(MissingCheckpoint, match="Looked for"):
        Checkpoint.resolve("unofficial")


@pytest.mark.parametrize("source", ["a/b", "/nowhere/at/all", "../nano"])
def test_a_path_that_is_no_folder_is_not_taken_for_a_name(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingCheckpoint):
        Checkpoint.resolve(source)


def test_metadata_says_what_the_checkpoint_was_trained_on(tmp_path: Path) -> None:
    trained_on = {"emotion": ["happy", "sad"], "denoise": True, "languages": ["en"]}
    (tmp_path / "editx.json").write_text(json.dumps({"name": "nano", "version": "1", "trained_on": trained_on}))
    metadata = Checkpoint.resolve(tmp_path).metadata
    assert metadata.name == "nano"
    assert metadata.knows("emotion", "happy")
    assert metadata.knows("emotion", "remove")
    assert not metadata.knows("emotion", "angry")
    assert not metadata.knows("style", "remove")
    assert not metadata.knows("style")
    assert metadata.knows("denoise")
    assert not metadata.knows("vad")
    assert metadata.knows("clone")


@pytest.mark.parametrize(
    ("edit", "untrained"),
    [
        (Edit(type="emotion", detail="happy"), []),
        (Edit(type="emotion", detail="fear"), ["emotion fear"]),
        (Edit(type="paralinguistic", target_text="Well [laughter], yes [cough] and [cough]."), ["[cough]"]),
        (Edit(type="clone", target_text="[Cantonese] [Laughter] Hello."), ["[Cantonese]"]),
        (Edit(type="clone", target_text="Hello."), []),
        (Edit(type="vad"), ["vad"]),
    ],
)
def test_what_an_edit_asks_for_beyond_the_training_is_named(edit: Edit, untrained: list[str]) -> None:
    trained_on = TrainedOn(emotion=("happy",), paralinguistic=("Laughter",), languages=("en", "zh"))
    assert Metadata(name="partly", trained_on=trained_on).untrained(edit) == untrained
    assert Metadata(name="official").untrained(edit) == []


def test_a_release_without_metadata_is_taken_to_know_every_published_edit(tmp_path: Path) -> None:
    metadata = Checkpoint.resolve(tmp_path).metadata
    assert metadata.name == tmp_path.name
    assert metadata.knows("style", "whisper")


def test_metadata_of_another_form_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "editx.json").write_text('{"version": 3}')
    with pytest.raises(InvalidCheckpoint, match=r"editx\.json is not valid: name: Field required; version: ") as caught:
        _ = Checkpoint.resolve(tmp_path).metadata
    assert "\n" not in caught.value.message


def test_finding_files_imports_no_torch() -> None:
    code = "import sys, shared.checkpoints.layout, shared.checkpoints.fetch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
