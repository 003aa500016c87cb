"""Faults under load, in short: `make chaos` does more rounds."""

from __future__ import annotations

from pathlib import Path

from editx.stack import chaos
from editx.stack.process import free_ports
from editx.stack.stack import SPAN


def test_nothing_accepted_is_lost_while_workers_die_and_stall(tmp_path: Path) -> None:
    port = free_ports(chaos.DETOUR + SPAN)
    report = chaos.run(tmp_path, rounds=1, port=port, servers=False, between_s=0.5, every_s=0.3)
    assert report.findings == [], str(report)
    assert report.accepted > 20
    assert report.ends == {"done": report.accepted}
    assert report.faults["kill gateway"] == 1
    assert report.resent > 0, "the gateway's death met no submission"
    assert report.checked > 3 * report.accepted
