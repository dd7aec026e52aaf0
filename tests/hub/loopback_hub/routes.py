"""The routes of the Hub that `huggingface_hub` uses for models, commits and files."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .handlers import Handler
from .store import LARGE, Blob, Commit, HubError, Repository

SLUG = r"[\w.-]+"
REPO = rf"(?P<repo>{SLUG}/{SLUG})"
#: Method, path and what answers; paths are matched quoted, since a branch or file name may hold a slash.
ROUTES = [
    (method, re.compile(path), name)
    for method, path, name in (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", "verify"),
        ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", rf"/api/models/{REPO}/branch/(?P<revision>[^/]+)", "branch"),
        ("GET", rf"/api/models/{REPO}(?:/revision/(?P<revision>[^/]+))?", "model"),
        ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("POST", rf"/api/models/{REPO}/paths-info/(?P<revision>[^/]+)", "paths"),
        ("GET", rf"/api/models/{REPO}/refs", "refs"),
        ("HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )
]


class HubHandler(Handler):
    """The Hub's routes; each is the method of its name in `ROUTES`."""

    name = "hub"

    def respond(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.user = self.hub.store.user(self.token())
        for method, pattern, name in ROUTES:
            match = pattern.fullmatch(url.path)
            if match is not None and method == self.command:
                words = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                return getattr(self, name)(**words)
        raise HubError(501, f"the loopback Hub has no {self.command} {url.path}")

    def token(self) -> str | None:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if kind == "Bearer" and token else None

    def repository(self, name: str, *, write: bool = False) -> Repository:
        return self.hub.store.repository(name, self.user, write=write)

    def whoami(self) -> None:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        access = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
        self.answer(200, {"type": "user", "name": self.user, "orgs": [], "auth": access})

    def create(self) -> None:
        asked = json.loads(self.body)
        self.full_name = f"{asked.get('organization') or self.user}/{asked['name']}"
        self.hub.store.require_owner(self.user, self.full_name.partition("/")[0])
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.store.create(self.full_name, private=bool(private))
        self.answer(200, {"name": self.full_name, **self.beside_error()})

    def beside_error(self) -> dict[str, Any]:
        """A repository that exists already is named in the refusal to create it."""
        return {"url": f"{self.hub.endpoint}/{self.full_name}"} if hasattr(self, "full_name") else {}

    def validate(self) -> None:
        empty = not json.loads(self.body)["content"].startswith("---\n")
        warnings = [{"message": "empty or missing yaml metadata in repo card"}] if empty else []
        self.answer(200, {"errors": [], "warnings": warnings})

    def preupload(self, repo: str, revision: str) -> None:
        present = self.repository(repo, write=True).head(revision).files
        found = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) or file["size"] > 10 * 2**20 else "regular"
            blob = present.get(file["path"])
            oid = None if blob is None else blob.sha256 if blob.large else blob.git_oid
            found.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": found})

    def batch(self, repo: str) -> None:
        self.repository(repo, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            upload = {"href": f"{self.hub.storage}/{oid}"}
            verify = {"href": f"{self.hub.endpoint}/{repo}.git/info/lfs/objects/verify"}
            actions = {} if oid in self.hub.store.objects else {"actions": {"upload": upload, "verify": verify}}
            objects.append({"oid": oid, "size": size, **actions})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def verify(self, repo: str) -> None:
        self.repository(repo, write=True)
        asked = json.loads(self.body)
        self.hub.store.verify(asked["oid"], asked["size"])
        self.answer(200, {})

    def commit(self, repo: str, revision: str) -> None:
        if "create_pr" in self.query:
            raise HubError(501, "the loopback Hub has no pull requests")
        repository = self.repository(repo, write=True)
        lines = [json.loads(line) for line in self.body.splitlines()]
        oid = self.hub.store.apply(repository, revision, lines).oid
        url = f"{self.hub.endpoint}/{repo}/commit/{oid}"
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def branch(self, repo: str, revision: str) -> None:
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        self.repository(repo, write=True).create_branch(revision, start)
        self.answer(200, {})

    def model(self, repo: str, revision: str = "main") -> None:
        repository = self.repository(repo)
        commit = repository.head(revision)
        files = [{"rfilename": path} for path in commit.files]
        names = {"_id": repo, "id": repo, "modelId": repo, "author": repo.partition("/")[0], "sha": commit.oid}
        readme = commit.files.get("README.md", Blob(b"", large=False)).content.decode()
        metadata = dict(
            re.findall(r"^(pipeline_tag|library_name): (\S+)$", readme.partition("\n---\n")[0], re.MULTILINE)
        )
        self.answer(200, {**names, **metadata, "private": repository.private, "tags": [], "siblings": files})

    def tree(self, repo: str, revision: str, path: str = "") -> None:
        commit = self.repository(repo).head(revision)
        folder = f"{path}/" if path else ""
        below = [name.removeprefix(folder) for name in commit.files if name.startswith(folder)]
        if path and not below:
            raise HubError(404, f"{path} does not exist on {revision!r}", "EntryNotFound", commit.oid)
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        files = [entry(folder + name, commit) for name in below if recursive or "/" not in name]
        folders = {name.partition("/")[0] for name in below if "/" in name}
        listed = [{"type": "directory", "path": folder + name, "oid": commit.oid, "size": 0} for name in folders]
        self.answer(200, files + listed, {"X-Repo-Commit": commit.oid})

    def paths(self, repo: str, revision: str) -> None:
        commit = self.repository(repo).head(revision)
        asked = parse_qs(self.body.decode()).get("paths", [])
        self.answer(200, [entry(path, commit) for path in asked if path in commit.files])

    def refs(self, repo: str) -> None:
        branches = self.repository(repo).branches.items()
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches]
        self.answer(200, {"branches": listed, "converts": [], "tags": []})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        commit, blob = self.repository(repo).blob(revision, path)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.git_oid}"'}
        if not blob.large:
            return self.answer_part(blob.content, headers)
        linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        return self.answer(302, b"", {**headers, **linked, "Location": f"{self.hub.storage}/{blob.sha256}"})


def entry(path: str, commit: Commit) -> dict[str, Any]:
    """Returns what a listing says of a file."""
    blob: Blob = commit.files[path]
    size = len(blob.content)
    large = {"lfs": {"oid": blob.sha256, "size": size, "pointerSize": 134}} if blob.large else {}
    return {"type": "file", "path": path, "oid": blob.git_oid, "size": size, **large}
