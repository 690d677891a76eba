"""As much of the Hugging Face Hub as its library needs for a dataset, over HTTP on this host."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_of_the_lab"


class Hub(BaseHTTPRequestHandler):
    """One private dataset, ``lab/features``, whose files lie in a folder."""

    protocol_version, wbufsize = "HTTP/1.1", 1 << 16

    def __init__(self, root: Path, *args) -> None:
        self.root = root
        super().__init__(*args)

    def do_GET(self) -> None:
        self.answer(*self.read())

    def do_POST(self) -> None:
        self.answer(*self.take(self.rfile.read(int(self.headers["Content-Length"]))))

    def read(self) -> tuple[bytes, int, str]:
        address = urlsplit(self.path)
        found = self.find(r"/api/datasets/lab/features/tree/main/?(.*)", address.path)
        if found is not None:
            folder = self.root / found
            if not folder.is_dir():
                return b"{}", 404, "EntryNotFound"
            wide = "True" in parse_qs(address.query).get("recursive", [""])[0].title()
            files = sorted(folder.rglob("*") if wide else folder.iterdir())
            return json.dumps([self.describe(file) for file in files]).encode(), 200, ""
        found = self.find(r"/datasets/lab/features/resolve/main/(.+)", address.path)
        if found is None:
            return b"{}", 401, "RepoNotFound"
        if not (self.root / found).is_file():
            return b"{}", 404, "EntryNotFound"
        data = (self.root / found).read_bytes()
        first, last = map(int, re.findall(r"\d+", self.headers["Range"]))
        return data[first : last + 1], 206, ""

    def take(self, sent: bytes) -> tuple[bytes, int, str]:
        if self.find(r"/api/datasets/lab/features/paths-info/main()", self.path) is not None:
            asked = parse_qs(sent.decode()).get("paths") or json.loads(sent)["paths"]
            files = [self.root / name for name in asked if (self.root / name).exists()]
            return json.dumps([self.describe(file) for file in files]).encode(), 200, ""
        if self.find(r"/api/datasets/lab/features/preupload/main()", self.path) is not None:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for one in json.loads(sent)["files"]
            ]
            return json.dumps({"files": files}).encode(), 200, ""
        if self.find(r"/api/datasets/lab/features/commit/main()", self.path) is None:
            return b"{}", 401, "RepoNotFound"
        for line in map(json.loads, sent.splitlines()):
            if line["key"] == "file":
                file = self.root / line["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(line["value"]["content"]))
        done = {
            "commitUrl": f"http://{self.headers['Host']}/datasets/lab/features/commit/0",
            "commitOid": "0",
            "success": True,
        }
        return json.dumps(done).encode(), 200, ""

    def find(self, pattern: str, path: str) -> str | None:
        """Give what is asked for of the dataset, by whoever may see it."""
        allowed = self.headers["Authorization"] == f"Bearer {TOKEN}"
        found = re.fullmatch(pattern, unquote(path.partition("?")[0]))
        return found[1] if found and allowed else None

    def describe(self, file: Path) -> dict[str, object]:
        name = str(file.relative_to(self.root))
        if file.is_dir():
            return {"type": "directory", "path": name, "oid": "0", "size": 0}
        return {"type": "file", "path": name, "oid": "0", "size": file.stat().st_size}

    def answer(self, data: bytes, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder with the files of the dataset, for whom the environment lets in."""
    constants = pytest.importorskip("huggingface_hub.constants")
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / ".gitattributes").write_text("*.bin filter=lfs\n")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield folder
        server.shutdown()
        thread.join()
