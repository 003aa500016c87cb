"""Files that are whole or absent, and places that are refused before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared.errors import UserError
from shared.files import check_target, make_folder, write_atomically


def test_a_full_disk_is_named_and_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out.wav"
    target.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full") as caught:
        write_atomically(target, b"new")
    assert caught.value.code == "disk_full"
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.wav"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        write_atomically(tmp_path / "no folder" / "out.wav", b"x")


def test_a_target_that_cannot_be_written_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_target(tmp_path / "out.wav")
    with pytest.raises(UserError, match="is a folder"):
        check_target(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        check_target(tmp_path / "nowhere" / "out.wav")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="no permission") as caught:
        check_target(tmp_path / "out.wav")
    assert caught.value.code == "cannot_write"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_made_with_its_parents_or_named(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be made"):
            make_folder(wrong)
