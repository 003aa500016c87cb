"""Where a webhook may go: public addresses only, resolved once and then pinned, so no name can point inwards later.

Hosts that the operator allows may be private and may speak plain HTTP.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from shared.errors import UserError

NAT64 = ipaddress.ip_network("64:ff9b::/96")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class RefusedAddress(UserError):
    """The URL leads, or may lead, to a place that is not public."""

    default_code = "webhook_refused"


@dataclass(frozen=True)
class Target:
    """A URL with its host replaced by one checked address; `host` is what goes into Host and SNI."""

    url: str
    host: str
    authority: str


def resolve(url: str, allowed: Collection[str] = ()) -> Target:
    """The place that a webhook URL means now. Raises RefusedAddress."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise RefusedAddress(f"The webhook URL cannot be read: {error}.", "Send a whole https URL.") from error
    is_allowed = host in allowed
    if parts.scheme not in (("https", "http") if is_allowed else ("https",)) or not host:
        raise RefusedAddress("A webhook URL must be a whole https URL.", "Serve the receiver with TLS.")
    if parts.username is not None or parts.password is not None:
        raise RefusedAddress("A webhook URL must not carry a password.", "Check the signature instead.")
    port = port or (443 if parts.scheme == "https" else 80)
    addresses = _addresses(host, port)
    inward = [address for address in addresses if not is_public(address)]
    if inward and not is_allowed:
        raise RefusedAddress(f"The webhook host {host} leads to {inward[0]}, which is not public.",
                             "Use a public address, or have the operator allow the host.")  # fmt: skip
    address = addresses[0]
    literal = f"[{address}]" if address.version == 6 else str(address)
    pinned = urlunsplit((parts.scheme, f"{literal}:{port}", parts.path or "/", parts.query, ""))
    return Target(pinned, host, parts.netloc)


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet, also where it wraps another one."""
    inner: Address | None = None
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if inner is not None:
        return is_public(inner)
    return address.is_global and not address.is_multicast and not address.is_reserved


def _addresses(host: str, port: int) -> list[Address]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    except (OSError, UnicodeError, ValueError) as error:
        raise RefusedAddress(f"The webhook host {host!r} has no address ({error}).", "Check its name.") from error
