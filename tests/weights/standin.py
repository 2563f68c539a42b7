"""A stand-in for the Hugging Face hub on this machine, and small files in the layouts that the authors published."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import torch
from huggingface_hub import constants
from torch import Tensor

from consissr.weights.names import published


def turn_to(address: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Let this process ask the hub at `address`, with its caches below `folder`."""
    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hf"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setenv("CONSISSR_HOME", str(folder / "home"))
    for name, entry in published().items():  # the digests are those of the real files
        sources = [replace(source, sha256={}) for source in entry.sources]
        patch.setitem(published(), name, replace(entry, sources=sources))


class Hub(ThreadingHTTPServer):
    """Serves the folders below `root` as repositories owner/name, as the hub's own protocol does."""

    def __init__(self, root: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.root, self.asked, self.tokens, self.ranges, self.cut, self.spoilt = root, [], set(), [], {}, {}
        """asked: method and path of every request; tokens: what it was authorised with; ranges: where it was to begin;
        cut: file -> bytes after which a connection ends, once; spoilt: file -> what is sent instead."""
        self.rewritten: set[str] = set()
        """rewritten: commits that no repository has any longer."""
        self.stuck, self.halfway = "", threading.Event()
        """stuck: a file of which half is sent and then nothing; halfway: that point is reached."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def gone(self) -> None:
        """No connection from here on."""
        self.shutdown()
        self.server_close()

    def back(self) -> Hub:
        """The same hub at the same address, after `gone`."""
        return Hub(self.root, self.server_port)

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    """HEAD and GET of files, and what a repository holds."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:  # noqa: N802
        self.answer(body=False)

    def do_GET(self) -> None:  # noqa: N802
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(urlparse(self.path).path)
        self.server.asked.append((self.command, path))
        self.server.tokens.add(self.headers.get("Authorization"))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            return self.listing(found[1], found[2], body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(*found.groups(), body)
        return self.refuse("EntryNotFound")

    def refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def listing(self, name: str, revision: str, body: bool) -> None:
        folder = self.server.root / name
        if not folder.is_dir() or revision in self.server.rewritten:
            return self.refuse("RevisionNotFound" if folder.is_dir() else "RepoNotFound")
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        siblings = [
            {
                "rfilename": file.relative_to(folder).as_posix(),
                "size": file.stat().st_size,
                "lfs": {"sha256": digest(file), "size": file.stat().st_size, "pointerSize": 1},
            }
            for file in files
        ]
        text = json.dumps({"id": name, "sha": commit(name, revision), "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if body:
            self.wfile.write(text)

    def file(self, name: str, revision: str, rest: str, body: bool) -> None:
        file = self.server.root / name / rest
        if not file.is_file():
            return self.refuse("EntryNotFound" if (self.server.root / name).is_dir() else "RepoNotFound")
        if revision in self.server.rewritten:
            return self.refuse("RevisionNotFound")
        data = self.server.spoilt.get(rest) or file.read_bytes()
        first = int(found[1]) if (found := re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")) else 0
        self.send_response(206 if first else 200)
        if first:
            self.server.ranges.append(self.headers["Range"])
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        for header, value in (
            ("X-Repo-Commit", commit(name, revision)),
            ("ETag", f'"{digest(file)}"'),
            ("Accept-Ranges", "bytes"),
            ("Content-Length", str(len(data) - first)),
        ):
            self.send_header(header, value)
        self.end_headers()
        if body and rest == self.server.stuck:
            self.wfile.write(data[: len(data) // 2])
            self.server.halfway.set()
            while self.rfile.read(1):  # until the client is gone
                pass
            self.close_connection = True
        elif body and rest in self.server.cut:
            self.wfile.write(data[first : first + self.server.cut.pop(rest)])
            self.close_connection = True
        elif body:
            self.wfile.write(data[first:])


def serve(hub: Hub, name: str, *files: Path) -> Path:
    """A repository with copies of files and folders."""
    folder = hub.root / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (shutil.copytree if file.is_dir() else shutil.copyfile)(file, folder / file.name)
    return folder


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def commit(name: str, revision: str = "main") -> str:
    """Forty hexadecimal digits, as the hub names a state of a repository; a revision that is one itself."""
    return revision if re.fullmatch("[0-9a-f]{40}", revision) else hashlib.sha1(name.encode()).hexdigest()


def filled(shapes: dict, seed: int = 0) -> dict[str, Tensor]:
    """Weights N(0, 1 / inputs), gains about 1, biases about 0, for names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (shape, kind) in shapes.items():
        value = torch.randn(shape, generator=generator)
        if kind == "int64":
            value = torch.zeros(shape, dtype=torch.int64)
        elif len(shape) > 1:
            value = value * (value[0].numel() ** -0.5)
        else:
            value = value * 0.05 + (0.0 if name.endswith("bias") else 1.0)
        found[name] = value
    return found


def v1_state(shapes: dict, seed: int = 0) -> dict[str, Tensor]:
    """CCSR v1's stage-2 checkpoint as the authors' class writes it, at a small width, with its real schedule."""
    from consissr.diffusion.schedule import alpha_bar

    state = filled(shapes, seed) | {"alphas_cumprod": alpha_bar().float()}
    first, copy = "first_stage_model.", "cond_encoder."
    state |= {n: state[n.replace(copy, first)] for n in shapes if n.startswith(copy)}
    return state
