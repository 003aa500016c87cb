"""`editx serve`: the gateway and the web studio, over this process or over the servers that the settings name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from editx.cli import options
from shared.errors import MissingComponent

PUBLIC = frozenset({"0.0.0.0", "::"})


def serve(
    host: Annotated[
        str, typer.Option("--host", envvar="EDITX_HOST", help="0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", envvar="EDITX_PORT", min=0, max=65535)] = 8000,
    checkpoint: options.CheckpointOption = "nano",
    device: options.DeviceOption = "cpu",
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Keep jobs, voices and audio here; else they go with the process.")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option("--keys", envvar="EDITX_API_KEYS_FILE", help="API keys, as docs/api.md shows.")
    ] = None,
    hosted: Annotated[
        bool, typer.Option("--hosted", help="Use the bus, stores and models of the EDITX_*_URL settings.")
    ] = False,
    warm: Annotated[bool, typer.Option("--warm/--cold", help="Load the models before the first call.")] = True,
) -> int:
    """Serve the HTTP API and the web studio until interrupted."""
    try:
        from editx import serving
        from services.gateway.settings import GatewaySettings
    except ModuleNotFoundError as error:
        raise MissingComponent(
            f"The package {error.name}", "editx serve needs it", "Install it with `pip install editx[stack]`."
        ) from error

    shown = "127.0.0.1" if host in PUBLIC else host
    public_url = os.environ.get("EDITX_PUBLIC_URL") or f"http://{shown}:{port}"
    settings = GatewaySettings(host=host, port=port, checkpoint=checkpoint, public_url=public_url, api_keys_file=keys)
    console = Console(stderr=True)
    if keys is None and host not in ("127.0.0.1", "::1", "localhost"):
        console.print("[yellow]Warning:[/] without --keys everybody who reaches this port may use it.", highlight=False)
    console.print(f"Studio at {public_url}/, API at {public_url}/docs", highlight=False)
    if hosted:
        serving.serve_hosted(settings)
    else:
        serving.serve_embedded(serving.Choices(checkpoint, device, folder, warm), settings)
    return 0
