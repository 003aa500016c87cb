"""`editx --url`: the runs of edit and clone go to a gateway instead of this process."""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from shared.errors import UserError

if TYPE_CHECKING:
    from editx.api import Editor
    from editx.remote import RemoteEditor

REMOTE_COMMANDS = frozenset({"edit", "clone"})


class Target(NamedTuple):
    """A gateway."""

    url: str
    api_key: str | None


_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar("editx_target", default=None)


def options(
    context: typer.Context,
    url: Annotated[
        str | None, typer.Option("--url", envvar="EDITX_URL", help="Have a gateway do it, as http://host:8000.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="EDITX_API_KEY", help="The key for --url.", show_envvar=True)
    ] = None,
) -> None:
    """Remember the gateway for this command. --url is refused where it has no use; EDITX_URL is ignored there."""
    _target.set(Target(url, api_key) if url else None)
    source = context.get_parameter_source("url")
    if source is not None and source.name == "COMMANDLINE" and context.invoked_subcommand not in REMOTE_COMMANDS:
        raise UserError(
            f"{context.invoked_subcommand} does not work with --url.", "Only edit and clone do.", "url_not_used"
        )


def target() -> Target | None:
    """The gateway that this command line names, if it names one."""
    return _target.get()


def open_editor(checkpoint: str, device: str) -> Editor | RemoteEditor:
    """What carries runs out: a gateway where one is named, else this process."""
    if (gateway := target()) is not None:
        from editx.remote import RemoteEditor

        return RemoteEditor(gateway.url, gateway.api_key)
    return open_local(checkpoint, device)


def open_local(checkpoint: str, device: str) -> Editor:
    """An editor of this process. Raises UserError for a device that is not there, before anything is loaded."""
    check_device(device)
    from editx.api import Editor

    return Editor(checkpoint, device=device)


def check_device(device: str) -> None:
    """Raise UserError for a device that this machine or its torch does not have."""
    if device == "cpu":
        return
    import torch

    number = device.removeprefix("cuda").removeprefix(":") or "0"
    if not device.startswith("cuda") or not number.isdecimal():
        raise UserError(f"There is no device {device!r}.", "Use cpu, cuda or cuda:N.", "no_device")
    if int(number) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no GPU"
        raise UserError(f"There is no device {device!r}: torch {torch.__version__} finds {found}.",
                        "Use --device cpu; `editx doctor` shows what there is.", "no_device")  # fmt: skip
