"""The hosted composition: adapters by URL, and what happens where one is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.gateway.app import create_app
from services.gateway.backend import WORKER_GROUPS, open_backend
from services.gateway.settings import GatewaySettings
from shared.errors import UserError


def settings(tiny: Path, folder: Path, **changes: str) -> GatewaySettings:
    urls = {
        "bus_url": "memory:",
        "store_url": f"file://{folder}/store",
        "jobs_url": f"sqlite://{folder}/jobs.sqlite",
        "inference_url": "local:",
    }
    return GatewaySettings(checkpoint=str(tiny), public_url="https://editx.example", **{**urls, **changes})


def test_adapters_are_chosen_by_url_and_closed_in_the_end(tiny: Path, tmp_path: Path) -> None:
    backend = open_backend(settings(tiny, tmp_path))
    for port in (backend.bus, backend.store, backend.jobs):
        port.ping()
    assert backend.metadata.name == "tiny"
    assert backend.store.presign_put("uploads/x/y").startswith("https://editx.example/v1/artifacts/uploads/x/y?")
    assert create_app(backend, settings(tiny, tmp_path)).title == "editx"
    backend.close()
    backend.close()


def test_an_unknown_scheme_is_named(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="carrier-pigeon"):
        open_backend(settings(tiny, tmp_path, bus_url="carrier-pigeon://roof"))


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDITX_WEBHOOK_ALLOWED_HOSTS", '["hooks.internal"]')
    monkeypatch.setenv("EDITX_WEBHOOK_SECRET", "whsec_c2VjcmV0")
    monkeypatch.setenv("EDITX_PORT", "9000")
    found = GatewaySettings()
    assert (found.webhook_allowed_hosts, found.port) == (("hooks.internal",), 9000)
    assert "c2VjcmV0" not in repr(found)


@pytest.mark.parametrize(
    ("kind", "service"), [(kind, group.removeprefix("editx-")) for kind, group in WORKER_GROUPS.items()]
)
def test_the_groups_whose_backlog_counts_are_those_of_the_workers(kind: str, service: str) -> None:
    root = Path(__file__).resolve().parents[3] / "services" / service
    assert f'run_worker("{service}"' in (root / "worker.py").read_text(encoding="utf-8").replace("\n        ", "")
    assert f'kind: StepKind = "{kind}"' in (root / "handler.py").read_text(encoding="utf-8")
