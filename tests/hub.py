# SPDX-License-Identifier: Apache-2.0
"""A Hub of our own for the tests: what huggingface_hub and datasets ask of huggingface.co, in memory, with faults.

The real clients talk to it over HTTP, in processes of their own, with HF_ENDPOINT set. `inject(fault, number)` makes it
answer the number-th request from then on (for `always-…` all later ones too) as a busy or broken Hub would. Large files
come by LFS: xet would be a second server, of a binary protocol.
"""

import base64
import hashlib
import io
import json
import re
import threading
import time
import uuid
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_marker_that_must_appear_nowhere"
USER = "user"
REPO = "/api/(models|datasets|spaces)/([^/]+/[^/]+)"  # kind, id
LFS_SUFFIXES = (".parquet", ".safetensors", ".png", ".jpg", ".pt", ".bin")


class Repo:
    """One repository: commits, each the whole list of its files."""

    def __init__(self, private: bool):
        self.private = private
        self.commits = [("0" * 40, {})]  # (sha, path → content)

    @property
    def head(self) -> tuple[str, dict[str, bytes]]:
        return self.commits[-1]

    def add(self, files: dict[str, bytes]) -> str:
        """A commit; returns its hash."""
        self.commits.append((uuid.uuid4().hex + "0" * 8, files))
        return self.commits[-1][0]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision in ("main", "HEAD"):
            return self.head
        return next((commit for commit in self.commits if commit[0] == revision), None)


class Hub:
    """The server's state. `repos` by (kind, id), kind "models" or "datasets"; `log` of (method, path); `uploaded`:
    (hash, size) of every content that came in by LFS, once for every time that it came; `served`: path → bytes of
    all answers. `stall_after`: that many files are taken in, then uploads hang, until it is None again; what hung is
    lost."""

    port = 0

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.uploaded: list[tuple[str, int]] = []
        self.served = Counter()
        self.read_only: set[str] = set()  # repositories that the token may not write to
        self.fault, self.number, self.requests, self.stall_after = None, 0, 0, None
        self.stalled = threading.Event()
        self.lock = threading.RLock()  # an answer counts its bytes, and may be given while it is held
        self.server = ThreadingHTTPServer(("127.0.0.1", Hub.port), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        Hub.port = self.server.server_port  # the same for the next one: libraries read the address when imported
        self.url = f"http://127.0.0.1:{Hub.port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def inject(self, fault: str | None, number: int = 1) -> None:
        """`fault`: a status (502 as an HTML page), `drop` (the connection is closed, no answer) or `lost` (the same,
        but what was asked is done first); with `always-` in front, from the number-th request on."""
        self.fault, self.number, self.requests = fault, number, 0

    def clear(self) -> None:
        self.repos, self.objects, self.log, self.uploaded, self.served = {}, {}, [], [], Counter()

    def close(self) -> None:
        self.stall_after = None
        self.server.shutdown()
        self.server.server_close()

    def environment(self) -> dict[str, str]:
        """What a client's process needs to talk to this Hub and to nothing else."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def contents(self) -> list[bytes]:
        """Every file of every commit of every repository."""
        return [content for repo in self.repos.values() for _, files in repo.commits for content in files.values()]

    def files(self, kind: str, repo_id: str) -> dict[str, bytes]:
        return self.repos[kind, repo_id].head[1]

    def commit(self, kind: str, repo_id: str, files: dict[str, bytes]) -> None:
        """What a person does on the Hub's pages: files added or changed."""
        repo = self.repos.setdefault((kind, repo_id), Repo(private=False))
        repo.add({**repo.head[1], **files})


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the acknowledgement of its header

    def log_message(self, *args):
        pass

    # Answers

    def answer(self, status: int, body=b"", **headers) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
            with self.hub.lock:
                self.hub.served[unquote(urlsplit(self.path).path)] += len(content)

    def missing(self, code: str, **headers) -> None:
        self.answer(404, {"error": code}, X_Error_Code=code, X_Error_Message=code, **headers)

    def faulty(self) -> bool:
        """Whether this request was answered with the fault."""
        hub = self.hub
        with hub.lock:
            hub.requests += 1
            always = (hub.fault or "").startswith("always-")
            due = hub.fault and (hub.requests == hub.number or always and hub.requests >= hub.number)
        if not due:
            return False
        fault = hub.fault.removeprefix("always-")
        if fault == "lost":
            self.wfile = io.BytesIO()  # the answer goes nowhere; `finish` then closes the connection
            self.close_connection = True
            return False
        if fault == "drop":
            self.close_connection = True
            self.connection.shutdown(2)
            return True
        if fault == "502":  # a proxy's page, not the Hub's own answer
            return self.answer(502, b"<html>injected 502 Bad Gateway</html>", Content_Type="text/html") or True
        headers = {"Retry_After": 1} if fault == "429" else {}
        self.answer(int(fault), {"error": f"injected {fault}"}, **headers)
        return True

    # Requests

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        self.hub.log.append((self.command, path))
        if self.faulty():
            return None
        allowed = self.headers.get("authorization") == f"Bearer {TOKEN}"
        if match := re.fullmatch(f"{REPO}/auth-check/write", path):
            writable = allowed and match.group(2) not in self.hub.read_only
            return self.answer(200, {}) if writable else self.answer(403, {"error": "You have no write access."})

        if match := re.fullmatch(rf"{REPO}(?:/(revision|tree)/([^/]+)(?:/(.*))?)?", path):
            return self.repo_information(*match.groups(), query)
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file("datasets" if match.group(1) else "models", *match.groups()[1:])
        return self.missing("EntryNotFound")

    def repo_information(self, kind, repo_id, what, revision, folder, query) -> None:
        repo = self.hub.repos.get((kind, repo_id))
        if repo is None:
            return self.missing("RepoNotFound")
        commit = repo.at(revision or "main")
        if commit is None:
            return self.missing("RevisionNotFound")
        sha, files = commit
        if what == "tree":
            return self.tree(files, folder or "", "true" in query.get("recursive", []))
        siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
        self.answer(200, {"id": repo_id, "sha": sha, "siblings": siblings, "private": repo.private, "gated": False})

    def tree(self, files: dict[str, bytes], folder: str, recursive: bool) -> None:
        entries, folders, prefix = [], set(), folder.rstrip("/") + "/" if folder else ""
        for name in (name for name in files if name.startswith(prefix)):
            parts, content = name.removeprefix(prefix).split("/")[:-1], files[name]
            depths = range(1, 1 + (len(parts) if recursive else min(len(parts), 1)))
            folders |= {prefix + "/".join(parts[:depth]) for depth in depths}
            if parts and not recursive:
                continue
            entry = {"type": "file", "oid": git_oid(content), "size": len(content), "path": name}
            if is_lfs(name):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        entries += [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(folders)]
        self.answer(200, entries)

    def file(self, kind: str, repo_id: str, revision: str, name: str) -> None:
        repo = self.hub.repos.get((kind, repo_id))
        commit = repo.at(revision) if repo else None
        if commit is None:
            return self.missing("RepoNotFound" if repo is None else "RevisionNotFound")
        sha, files = commit
        if name not in files:
            return self.missing("EntryNotFound", X_Repo_Commit=sha)
        content = files[name]
        oid = oid_of(name, content)
        headers = {"X_Repo_Commit": sha, "ETag": f'"{oid}"', "Accept_Ranges": "bytes"}
        if is_lfs(name):
            headers |= {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": len(content)}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        if wanted:
            start, end = int(wanted.group(1)), min(int(wanted.group(2) or len(content)), len(content) - 1)
            part = content[start : end + 1]
            return self.answer(206, part, Content_Range=f"bytes {start}-{end}/{len(content)}", **headers)
        self.answer(200, content, Content_Length=len(content), **headers)

    def do_POST(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self.body()
        self.hub.log.append(("POST", path))
        if self.faulty():
            return None
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials"})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if match := re.fullmatch(f"{REPO}/preupload/.+", path):
            return self.preupload(self.hub.repos[match.groups()], json.loads(body))
        if match := re.fullmatch(f"{REPO}/commit/.+", path):
            return self.commit(*match.groups(), body)
        assert path.endswith(".git/info/lfs/objects/batch"), path
        return self.lfs_batch(json.loads(body))

    def do_PUT(self):
        path = unquote(urlsplit(self.path).path)
        body = self.body()
        self.hub.log.append(("PUT", path))
        if self.faulty():
            return None
        oid = path.rsplit("/", 1)[1]
        assert hashlib.sha256(body).hexdigest() == oid
        with self.hub.lock:  # a client sends several files at once
            stalls = self.hub.stall_after is not None and len(self.hub.uploaded) >= self.hub.stall_after
            if not stalls:
                self.hub.objects[oid] = body
                self.hub.uploaded.append((oid, len(body)))
        if not stalls:
            return self.answer(200)
        self.hub.stalled.set()
        while self.hub.stall_after is not None:
            time.sleep(0.05)
        self.close_connection = True
        return None

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def create(self, wanted: dict) -> None:
        kind = f"{wanted.get('type') or 'model'}s"
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"
        with self.hub.lock:
            if (kind, repo_id) in self.hub.repos:
                return self.answer(409, {"error": "You already created this repo", "url": url})
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.hub.repos[kind, repo_id] = Repo(private)
        return self.answer(200, {"url": url, "name": repo_id, "id": uuid.uuid4().hex})

    def preupload(self, repo: Repo, wanted: dict) -> None:
        files, answers = repo.head[1], []
        for path in (file["path"] for file in wanted["files"]):
            known = oid_of(path, files[path]) if path in files else None
            mode = "lfs" if is_lfs(path) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        self.answer(200, {"files": answers})

    def lfs_batch(self, wanted: dict) -> None:
        objects = []
        for item in wanted["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}}
            objects.append(answer)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, kind: str, repo_id: str, body: bytes) -> None:
        repo = self.hub.repos[kind, repo_id]
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            parent = header.get("parentCommit")
            if parent and parent != repo.head[0]:
                return self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            files = dict(repo.head[1])
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            sha = repo.add(files)
        prefix = "datasets/" if kind == "datasets" else ""
        url = f"{self.hub.url}/{prefix}{repo_id}/commit/{sha}"
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": url})


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def oid_of(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if is_lfs(path) else git_oid(content)
