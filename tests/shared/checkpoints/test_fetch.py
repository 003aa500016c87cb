import hashlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.checkpoints import manifest
from shared.checkpoints.fetch import RELEASES, HashMismatch, Lock, Part, fetch, read_lock
from shared.checkpoints.hubs import HubUnreachable, ModelScope, RevisionNotFound
from shared.checkpoints.layout import EDITX_FOLDER
from shared.errors import UserError
from tests.shared.checkpoints.loopback_hub import COMMIT, NEWER, LoopbackHub, serve

EDITX, TOKENIZER = "stepfun-ai/Step-Audio-EditX", "stepfun-ai/Step-Audio-Tokenizer"
HUBS = ("huggingface", "modelscope")
WEIGHTS = bytes(range(256)) * 12_000


PINNED = RELEASES["official"]


@pytest.fixture(autouse=True)
def unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The release as it would be if nobody had named a commit."""
    monkeypatch.setitem(RELEASES, "official", tuple(Part(part.folder, part.repository, {}) for part in PINNED))


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    files = {
        EDITX: {
            "config.json": b"{}",
            "model-00001.safetensors": WEIGHTS,
            "modeling_step1.py": b"raise SystemExit",
            "CosyVoice-300M-25Hz/flow.pt": WEIGHTS[::-1],
        },
        TOKENIZER: {"speech_tokenizer_v1.onnx": b"graph", "empty.txt": b""},
    }
    with serve(LoopbackHub(files)) as running:
        yield running


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("source", HUBS)
def test_a_fetch_brings_every_file_but_code_and_records_commits_and_hashes(
    hub: LoopbackHub, tmp_path: Path, source: str
) -> None:
    seen: dict[str, tuple[int, int]] = {}
    root = fetch("official", tmp_path / "o", source=source, endpoint=hub.endpoint,
                 progress=lambda path, done, total: seen.update({path: (done, total)}))  # fmt: skip
    assert (root / "Step-Audio-EditX/model-00001.safetensors").read_bytes() == WEIGHTS
    assert (root / "Step-Audio-EditX/CosyVoice-300M-25Hz/flow.pt").read_bytes() == WEIGHTS[::-1]
    assert (root / "Step-Audio-Tokenizer/empty.txt").read_bytes() == b""
    assert not list(root.rglob("*.py"))
    assert not list(root.rglob("*.part"))
    lock = read_lock(root)
    assert isinstance(lock, Lock)
    assert {folder: locked.revision for folder, locked in lock.folders.items()} == {
        "Step-Audio-EditX": COMMIT, "Step-Audio-Tokenizer": COMMIT
    }  # fmt: skip
    hashes = manifest.read(root)
    assert hashes is not None
    assert hashes["Step-Audio-EditX/model-00001.safetensors"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert seen["model-00001.safetensors"] == (len(WEIGHTS), len(WEIGHTS))


@pytest.mark.parametrize("source", HUBS)
def test_a_broken_transfer_goes_on_where_it_stopped(hub: LoopbackHub, tmp_path: Path, source: str) -> None:
    hub.cut_after, hub.cuts_left = 1_500_000, 1
    root = fetch("official", tmp_path, source=source, endpoint=hub.endpoint)
    assert (root / "Step-Audio-EditX/model-00001.safetensors").read_bytes() == WEIGHTS
    ranges = [asked for path, asked in hub.requests if asked]
    assert len(ranges) == 1
    assert int(ranges[0].removeprefix("bytes=").rstrip("-")) > 0


def test_a_second_run_resumes_the_part_file_of_the_first(hub: LoopbackHub, tmp_path: Path) -> None:
    part = tmp_path / "Step-Audio-EditX/model-00001.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(WEIGHTS[:1000])
    fetch("official", tmp_path, endpoint=hub.endpoint)
    assert (tmp_path / "Step-Audio-EditX/model-00001.safetensors").read_bytes() == WEIGHTS
    assert "bytes=1000-" in [asked for _, asked in hub.requests]


def test_a_server_that_ignores_ranges_starts_the_file_over(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.cut_after, hub.cuts_left, hub.ignore_ranges = 1_500_000, 1, True
    fetch("official", tmp_path, endpoint=hub.endpoint)
    assert (tmp_path / "Step-Audio-EditX/model-00001.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("source", HUBS)
def test_a_file_with_another_hash_is_refused_and_removed(hub: LoopbackHub, tmp_path: Path, source: str) -> None:
    hub.wrong_hash_for = "CosyVoice-300M-25Hz/flow.pt"
    with pytest.raises(HashMismatch, match=r"flow\.pt"):
        fetch("official", tmp_path, source=source, endpoint=hub.endpoint)
    assert not list(tmp_path.rglob("flow.pt*"))
    assert manifest.read(tmp_path) is None


def test_a_small_text_file_is_checked_by_its_git_hash(hub: LoopbackHub, tmp_path: Path) -> None:
    config = tmp_path / "Step-Audio-EditX/config.json"
    config.parent.mkdir(parents=True)
    config.write_bytes(b"[]")
    fetch("official", tmp_path, endpoint=hub.endpoint)
    assert config.read_bytes() == b"{}"


@pytest.mark.parametrize("source", HUBS)
def test_a_repeated_fetch_keeps_the_locked_commit_and_downloads_nothing(
    hub: LoopbackHub, tmp_path: Path, source: str
) -> None:
    fetch("official", tmp_path, source=source, endpoint=hub.endpoint)
    hub.head = NEWER
    hub.requests.clear()
    fetch("official", tmp_path, source=source, endpoint=hub.endpoint)
    lock = read_lock(tmp_path)
    assert lock is not None
    assert lock.folders["Step-Audio-EditX"].revision == COMMIT
    assert len(hub.requests) == 2
    fetch("official", tmp_path, source=source, endpoint=hub.endpoint, update=True)
    assert json.loads((tmp_path / "editx.lock.json").read_text())["folders"]["Step-Audio-EditX"]["revision"] == NEWER


def test_a_first_fetch_takes_the_pinned_commits_and_an_update_the_newest(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RELEASES, "official", PINNED)
    fetch("official", tmp_path, endpoint=hub.endpoint)
    lock = read_lock(tmp_path)
    assert lock is not None
    commits = {part.folder: part.revisions["huggingface"] for part in PINNED}
    assert {folder: locked.revision for folder, locked in lock.folders.items()} == commits
    assert all(len(commit) == 40 for commit in commits.values())
    fetch("official", tmp_path, endpoint=hub.endpoint, update=True)
    lock = read_lock(tmp_path)
    assert lock is not None
    assert {locked.revision for locked in lock.folders.values()} == {COMMIT}


@pytest.mark.parametrize("source", HUBS)
def test_a_hub_that_lists_another_speaker_encoder_than_the_release_s_is_refused(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setitem(RELEASES, "official", (Part(EDITX_FOLDER, EDITX, {}, PINNED[0].sha256),))
    hub.repositories[EDITX]["CosyVoice-300M-25Hz/campplus.onnx"] = b"another"
    with pytest.raises(HashMismatch, match=r"campplus\.onnx"):
        fetch("official", tmp_path, source=source, endpoint=hub.endpoint)
    assert not list(tmp_path.rglob("*.pt"))


def test_a_folder_begun_from_one_hub_is_not_continued_from_the_other(hub: LoopbackHub, tmp_path: Path) -> None:
    fetch("official", tmp_path, source="huggingface", endpoint=hub.endpoint)
    with pytest.raises(UserError, match="begun from huggingface"):
        fetch("official", tmp_path, source="modelscope", endpoint=hub.endpoint)


@pytest.mark.parametrize("source", HUBS)
def test_without_a_network_one_line_says_where_to_put_the_files(tmp_path: Path, source: str) -> None:
    with pytest.raises(HubUnreachable) as caught:
        fetch("official", tmp_path / "official", source=source, endpoint=closed_port())
    assert "\n" not in caught.value.message
    assert caught.value.hint == ""
    assert f"{TOKENIZER} into {tmp_path / 'official' / 'Step-Audio-Tokenizer'}" in caught.value.message
    assert not (tmp_path / "official").exists()


def test_an_unknown_repository_or_revision_is_named(hub: LoopbackHub) -> None:
    with pytest.raises(RevisionNotFound, match="404"):
        ModelScope(hub.endpoint).listing("nobody/nothing", None)
    with pytest.raises(RevisionNotFound, match="revision v9"):
        ModelScope(hub.endpoint).listing(EDITX, "v9")


def test_a_listed_path_that_leaves_the_folder_is_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.repositories[EDITX]["../../evil"] = b"x"
    with pytest.raises(UserError, match="unsafe path"):
        fetch("official", tmp_path / "o", source="modelscope", endpoint=hub.endpoint)


def test_an_unknown_release_or_hub_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="official"):
        fetch("officail", tmp_path)
    with pytest.raises(UserError, match="huggingface, modelscope"):
        fetch("official", tmp_path, source="somewhere")


def test_a_damaged_lock_file_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "editx.lock.json").write_text("{")
    with pytest.raises(UserError, match=r"editx\.lock\.json is not a lock file: Invalid JSON") as caught:
        read_lock(tmp_path)
    assert "\n" not in caught.value.message
