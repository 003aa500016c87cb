"""The artifact store's promises."""

import hashlib
import io
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from shared.errors import UserError
from shared.store.port import ArtifactNotFound, ArtifactStore, InvalidKey


@pytest.fixture
def prefix() -> str:
    return f"jobs/job_{uuid.uuid4().hex[:12]}/"


def test_an_object_comes_back_as_it_was_put(store: ArtifactStore, prefix: str) -> None:
    put = store.put(f"{prefix}0-tokenize/tokens.safetensors", b"tokens", content_type="application/x-tokens")
    assert store.get(put.key) == b"tokens"
    found = store.stat(put.key)
    assert (found.size, found.content_type, found.sha256) == (
        6, "application/x-tokens", hashlib.sha256(b"tokens").hexdigest(),
    )  # fmt: skip
    assert found.modified_at > 0


def test_a_stream_is_stored_and_read_as_a_stream(store: ArtifactStore, prefix: str) -> None:
    data = bytes(range(256)) * 4096 * 6  # above the part size of multipart uploads
    store.put(f"{prefix}source/audio", io.BytesIO(data))
    with store.open(f"{prefix}source/audio") as stream:
        assert stream.read(10) == data[:10]
        assert stream.read() == data[10:]


def test_an_empty_object_can_be_stored(store: ArtifactStore, prefix: str) -> None:
    store.put(f"{prefix}empty", b"")
    assert store.get(f"{prefix}empty") == b""


def test_a_second_put_replaces_the_first(store: ArtifactStore, prefix: str) -> None:
    store.put(f"{prefix}audio.wav", b"first, longer")
    store.put(f"{prefix}audio.wav", b"second")
    assert store.get(f"{prefix}audio.wav") == b"second"
    assert store.stat(f"{prefix}audio.wav").size == 6


def test_a_put_that_breaks_off_leaves_nothing(store: ArtifactStore, prefix: str) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 0:
                raise OSError("the upload broke off")
            return super().read(16)

    with pytest.raises(Exception, match="broke off"):
        store.put(f"{prefix}audio.wav", Broken(b"x" * 64))
    with pytest.raises(ArtifactNotFound):
        store.get(f"{prefix}audio.wav")


def test_readers_see_whole_objects_while_writers_replace_them(store: ArtifactStore, prefix: str) -> None:
    key, sizes = f"{prefix}audio.wav", (1_000, 200_000)
    contents = [bytes([size % 251]) * size for size in sizes]
    store.put(key, contents[0])
    stop, torn = threading.Event(), []

    def watch() -> None:
        while not stop.is_set():
            if store.get(key) not in contents:
                torn.append(True)

    readers = [threading.Thread(target=watch) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(30):
        store.put(key, contents[number % 2])
    stop.set()
    for reader in readers:
        reader.join()
    assert not torn


def test_an_absent_object_is_named_in_the_error(store: ArtifactStore, prefix: str) -> None:
    for read in (store.get, store.stat, lambda key: store.open(key).read()):
        with pytest.raises(ArtifactNotFound, match="nothing-here"):
            read(f"{prefix}nothing-here")
    store.delete(f"{prefix}nothing-here")


def test_objects_are_listed_by_prefix_in_order(store: ArtifactStore, prefix: str) -> None:
    for name in ("1-generate/b", "0-tokenize/a", "1-generate/a"):
        store.put(prefix + name, b"x")
    assert [info.key for info in store.list(prefix)] == [
        f"{prefix}0-tokenize/a", f"{prefix}1-generate/a", f"{prefix}1-generate/b",
    ]  # fmt: skip
    assert [info.key for info in store.list(f"{prefix}1-gen")] == [f"{prefix}1-generate/a", f"{prefix}1-generate/b"]
    assert list(store.list(f"{prefix}2")) == []


def test_deleting_a_prefix_leaves_its_neighbours(store: ArtifactStore, prefix: str) -> None:
    store.put(f"{prefix}0-tokenize/a", b"x")
    store.put(f"{prefix}0-tokenize/b", b"x")
    store.put(f"{prefix}source/audio", b"x")
    assert store.delete_prefix(f"{prefix}0-tokenize/") == 2
    assert [info.key for info in store.list(prefix)] == [f"{prefix}source/audio"]
    with pytest.raises(InvalidKey):
        store.delete_prefix("")


def test_old_objects_expire_and_new_ones_stay(store: ArtifactStore, prefix: str) -> None:
    store.put(f"{prefix}audio.wav", b"x")
    assert store.expire(prefix, older_than_s=3600) == 0
    assert store.expire(prefix, older_than_s=-5) == 1
    with pytest.raises(ArtifactNotFound):
        store.get(f"{prefix}audio.wav")


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../up", "a/../b", "a//b", "a/", ".hidden", "a b", "a\x00b", "x" * 600]
)
def test_a_key_that_leads_elsewhere_is_refused(store: ArtifactStore, key: str) -> None:
    for use in (lambda: store.put(key, b"x"), lambda: store.get(key), lambda: store.presign_get(key)):
        with pytest.raises(UserError):
            use()


def test_presigned_urls_name_the_object_and_differ_by_method(store: ArtifactStore, prefix: str) -> None:
    key = f"{prefix}audio.wav"
    reading, writing = store.presign_get(key), store.presign_put(key, expires_s=60)
    assert key in reading
    assert key in writing
    assert reading != writing


def test_the_store_answers_a_ping(store: ArtifactStore) -> None:
    store.ping()


def test_neighbours_come_and_go_while_others_put_and_list(store: ArtifactStore, prefix: str) -> None:
    def come_and_go(name: str) -> None:
        for _ in range(25):
            store.put(f"{prefix}deep/{name}", b"here")
            assert store.get(f"{prefix}deep/{name}") == b"here"
            assert list(store.list(prefix)) is not None
            store.delete(f"{prefix}deep/{name}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(come_and_go, "abcd"))
    assert list(store.list(prefix)) == []
