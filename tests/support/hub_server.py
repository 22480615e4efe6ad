"""A hub of data sets on this machine: the part of its protocol that ``datasets`` streams a repository by."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

COMMIT = "a" * 40


@contextmanager
def hub_of(folder: Path) -> Iterator[str]:
    """Serve every ``OWNER/NAME`` below a folder; gives the address for ``HF_ENDPOINT``.

    The files of a repository whose name has ``gated`` in it are refused, as the hub does without an agreement.
    """

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            parts = url.path.strip("/").split("/")
            if parts[:2] == ["api", "datasets"]:
                repository, what = folder.joinpath(*parts[2:4]), parts[4:5]
                if what == ["tree"]:
                    recursive = parse_qs(url.query).get("recursive") == ["true"]
                    return self._say(200, self._tree(repository, repository.joinpath(*parts[6:]), recursive))
                if repository.is_dir() and what in ([], ["revision"]):
                    return self._say(200, {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": [], "tags": []})
            elif parts[0] == "datasets" and parts[3] == "resolve":
                file = folder.joinpath(*parts[1:3], *parts[5:])
                if "gated" in parts[2]:
                    return self._say(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
                if file.is_file():
                    return self._send_file(file.read_bytes())
            self._say(404, {"error": "not here"}, {"X-Error-Code": "EntryNotFound"})

        def _tree(self, repository: Path, below: Path, recursive: bool) -> list[dict]:
            found = sorted(below.rglob("*") if recursive else below.iterdir()) if below.is_dir() else []
            return [
                {
                    "type": "file" if path.is_file() else "directory",
                    "oid": "0" * 40,
                    "size": path.stat().st_size if path.is_file() else 0,
                    "path": path.relative_to(repository).as_posix(),
                }
                for path in found
            ]

        def _send_file(self, content: bytes) -> None:
            headers = {
                "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            wanted, total = self.headers.get("Range"), len(content)
            if wanted is None:
                return self._say(200, content, headers)
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            end = min(int(last), total - 1) if last else total - 1
            headers["Content-Range"] = f"bytes {first}-{end}/{total}"
            self._say(206, content[int(first) : end + 1], headers)

        def _say(self, status: int, content: bytes | list | dict, headers: dict[str, str] | None = None) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
