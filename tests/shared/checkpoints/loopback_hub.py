"""A hub on the loopback interface that answers like huggingface.co and modelscope.cn, and misbehaves on request."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEWER = "89abcdef0123456789abcdef0123456789abcdef"


@dataclass
class LoopbackHub:
    """`repositories` maps a repository to its files. `cut_after` closes each transfer after that many bytes."""

    repositories: dict[str, dict[str, bytes]]
    head: str = COMMIT
    cut_after: int | None = None
    cuts_left: int = 0
    ignore_ranges: bool = False
    wrong_hash_for: str | None = None
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    endpoint: str = ""

    def listed_sha256(self, path: str, content: bytes) -> str:
        return "0" * 64 if path == self.wrong_hash_for else hashlib.sha256(content).hexdigest()

    def hugging_face(self, repository: str, revision: str) -> dict[str, object]:
        siblings = []
        for path, content in self.repositories[repository].items():
            entry: dict[str, object] = {"rfilename": path, "size": len(content)}
            if path.endswith((".safetensors", ".pt", ".onnx")):
                digest = self.listed_sha256(path, content)
                entry |= {"blobId": "x", "lfs": {"size": len(content), "sha256": digest, "pointerSize": 130}}
            else:
                entry |= {"blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
            siblings.append(entry)
        return {"id": repository, "sha": revision, "siblings": siblings, "private": False, "tags": [], "downloads": 0}

    def modelscope(self, repository: str, revision: str) -> dict[str, object]:
        if revision not in ("master", COMMIT, NEWER):
            return {"Code": 200, "Success": True, "Data": {"Files": None, "LatestCommitter": None}}
        files: list[dict[str, object]] = [{"Path": "folder", "Type": "tree", "Size": 0}]
        for path, content in self.repositories[repository].items():
            digest = self.listed_sha256(path, content)
            files.append({"Path": path, "Type": "blob", "Size": len(content), "Sha256": digest, "Revision": self.head})
        return {"Code": 200, "Success": True, "Data": {"Files": files, "LatestCommitter": {"ShortId": self.head[:8]}}}


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            hub.requests.append((self.path, self.headers.get("Range")))
            parts = unquote(url.path).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                asked = parts[5] if len(parts) > 5 else "main"
                self.listing(hub.hugging_face, "/".join(parts[2:4]), hub.head if asked == "main" else asked)
            elif parts[:3] == ["api", "v1", "models"] and parts[-1] == "files":
                self.listing(hub.modelscope, "/".join(parts[3:5]), query["Revision"])
            elif parts[:3] == ["api", "v1", "models"]:
                self.content(hub.repositories["/".join(parts[3:5])][query["FilePath"]])
            else:
                self.content(hub.repositories["/".join(parts[:2])]["/".join(parts[4:])])

        def listing(self, form: object, repository: str, revision: str) -> None:
            known = repository in hub.repositories
            body = json.dumps(form(repository, revision) if known and callable(form) else {"error": "none"}).encode()
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def content(self, body: bytes) -> None:
            asked = self.headers.get("Range")
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and not hub.ignore_ranges else 0
            rest = body[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            if hub.cut_after is not None and hub.cuts_left > 0 and len(rest) > hub.cut_after:
                hub.cuts_left -= 1
                self.wfile.write(rest[: hub.cut_after])
                self.close_connection = True
                return
            self.wfile.write(rest)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@contextmanager
def serve(hub: LoopbackHub) -> Iterator[LoopbackHub]:
    """Run the hub on a free port until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
