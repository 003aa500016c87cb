"""Webhooks against a receiver on this machine, and the addresses that they must never reach."""

from __future__ import annotations

import base64
import ipaddress
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from standardwebhooks.webhooks import Webhook

from services.gateway import webhooks
from services.gateway.addresses import RefusedAddress, is_public, resolve
from services.gateway.webhooks import Webhooks
from shared.outbox import PREFIX
from tests.fixtures.gateways import Served, serving, wav
from tests.fixtures.receiver import Receiver

SECRET = "whsec_" + base64.b64encode(b"a secret of thirty-two bytes....").decode()
DENOISE = {"type": "denoise"}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    yield found
    found.close()


@pytest.fixture(scope="module")
def hooked(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    settings = {
        "webhook_secret": SECRET,
        "webhook_allowed_hosts": ("127.0.0.1",),
        "webhook_retries_s": (0.1, 0.1),
    }
    with serving(tiny, tmp_path_factory.mktemp("hooked"), **settings) as found:
        yield found


def submit(served: Served, url: str) -> httpx.Response:
    with served.client() as client:
        return client.post("/v1/audio/edits", data={**DENOISE, "webhook_url": url}, files={"audio": wav()})


def outbox(served: Served) -> list[str]:
    return [info.key for info in served.system.store.list(PREFIX)]


def emptied(served: Served, timeout_s: float = 5.0) -> bool:
    until = time.monotonic() + timeout_s
    while outbox(served) and time.monotonic() < until:
        time.sleep(0.02)
    return not outbox(served)


def test_the_end_of_a_job_is_told_once_and_signed(hooked: Served, receiver: Receiver) -> None:
    job_id = submit(hooked, receiver.url).json()["id"]
    headers, body = receiver.wait(1)[0]
    told = Webhook(SECRET).verify(body, headers)
    assert told["type"] == "job.done"
    assert told["data"] == {"id": job_id, "object": "audio.edit", "status": "done", "error": None}
    assert headers["webhook-id"] == f"msg_{job_id}"
    assert emptied(hooked)
    assert len(receiver.posts) == 1


def test_a_receiver_that_fails_is_asked_again_with_the_same_id(hooked: Served, receiver: Receiver) -> None:
    receiver.answers = [(500, {})]
    submit(hooked, receiver.url)
    first, second = receiver.wait(2)
    assert first[0]["webhook-id"] == second[0]["webhook-id"]
    assert emptied(hooked)


def test_a_receiver_that_always_fails_is_given_up(hooked: Served, receiver: Receiver) -> None:
    receiver.answers = [(503, {})] * 9
    submit(hooked, receiver.url)
    assert len(receiver.wait(3)) == 3
    assert emptied(hooked)
    assert len(receiver.posts) == 3


def test_a_redirect_is_not_followed(hooked: Served, receiver: Receiver) -> None:
    receiver.answers = [(302, {"location": receiver.url})] * 9
    submit(hooked, receiver.url)
    receiver.wait(3)
    assert emptied(hooked)
    assert len(receiver.posts) == 3


def test_what_a_dead_gateway_left_behind_is_taken_over(
    hooked: Served, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "TAKEOVER_S", 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooked.gateway.webhooks, "watch", lambda _: None)  # the gateway dies after it accepted
        job_id = submit(hooked, receiver.url).json()["id"]
        hooked.system.wait(job_id)
    gateway = hooked.gateway
    other = Webhooks(hooked.system.store, hooked.system.jobs, gateway.keys, gateway.settings, gateway.metrics)
    other.start()
    assert json.loads(receiver.wait(1)[0][1])["data"]["id"] == job_id
    assert emptied(hooked)
    other.stop()


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/",
        "https://127.0.0.2/",
        "https://localhost/",
        "https://10.0.0.8/",
        "https://192.168.1.1:8443/",
        "https://169.254.169.254/latest/meta-data",
        "https://[::1]/",
        "https://[fe80::1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[64:ff9b::7f00:1]/",
        "https://[2002:7f00:1::]/",
        "https://0.0.0.0/",
        "https://224.0.0.1/",
        "https://2130706433/",
        "https://0x7f.1/",
        "https://user:word@1.1.1.1/",
        "https:///nowhere",
        "ftp://1.1.1.1/",
        "https://1.1.1.1:99999/",
        "nonsense",
    ],
)
def test_places_that_are_not_public_are_refused_at_once(hooked: Served, url: str) -> None:
    answer = submit(hooked, url)
    assert (answer.status_code, answer.json()["code"]) == (400, "webhook_refused")
    assert not outbox(hooked)


def test_a_public_host_is_pinned_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [[(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("1.1.1.1", 443))]]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers[0])
    target = resolve("https://hooks.example:8443/a?b=c")
    assert (target.url, target.host) == ("https://1.1.1.1:8443/a?b=c", "hooks.example")
    answers[0] = [*answers[0], (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 443))]
    with pytest.raises(RefusedAddress, match=r"10\.0\.0\.1"):
        resolve("https://hooks.example/")


def test_wrapped_addresses_are_judged_by_what_they_wrap() -> None:
    assert is_public(ipaddress.ip_address("8.8.8.8"))
    assert is_public(ipaddress.ip_address("64:ff9b::808:808"))
    assert not is_public(ipaddress.ip_address("64:ff9b::a00:1"))


def test_without_a_secret_webhooks_are_refused(served: Served) -> None:
    answer = submit(served, "https://1.1.1.1/")
    assert (answer.status_code, answer.json()["code"]) == (400, "webhook_no_secret")
