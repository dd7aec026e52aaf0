"""What the loopback Hub keeps: repositories of immutable commits, and large objects by their sha256."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MAIN = "main"
#: Ends of the names that are stored by hash, as `.gitattributes` of a new repository on the Hub says.
LARGE = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".zip", ".parquet", ".png")


class HubError(Exception):
    """A request that the Hub answers with an error: status, its code in X-Error-Code, and a message."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.commit = status, code, commit


@dataclass(frozen=True, slots=True)
class Blob:
    """Content of a file; a large one is fetched from the storage server."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        """Git's name of what the repository itself holds: the content, or the pointer to it."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        held = pointer.encode() if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()


@dataclass(frozen=True, slots=True)
class Commit:
    """A snapshot of all files, that never changes."""

    oid: str
    parent: str | None
    title: str
    files: Mapping[str, Blob]


@dataclass(slots=True)
class Repository:
    """Commits and the branches that point to them."""

    name: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def head(self, revision: str = MAIN) -> Commit:
        """Returns the commit of a branch or of a commit's own name."""
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def blob(self, revision: str, path: str) -> tuple[Commit, Blob]:
        commit = self.head(revision)
        if path not in commit.files:
            raise HubError(404, f"{path} does not exist on {revision!r}", "EntryNotFound", commit.oid)
        return commit, commit.files[path]

    def create_branch(self, branch: str, start: str = MAIN) -> None:
        if branch in self.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        self.branches[branch] = self.head(start).oid

    def commit(self, branch: str, title: str, files: Mapping[str, Blob]) -> Commit:
        """Appends a commit with these files, all of them, to a branch."""
        parent = self.branches.get(branch)
        listed = sorted((path, blob.git_oid) for path, blob in files.items())
        oid = hashlib.sha1(json.dumps([parent, title, len(self.commits), listed]).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, dict(files))
        self.branches[branch] = oid
        return self.commits[oid]

    def history(self, revision: str = MAIN) -> list[Commit]:
        """Returns the commits of a branch, latest first."""
        found, oid = [], self.head(revision).oid
        while oid is not None:
            found.append(self.commits[oid])
            oid = found[-1].parent  # type: ignore[assignment]
        return found


@dataclass(slots=True)
class Store:
    """All repositories, users and large objects.

    Attributes:
        users: names by token.
        repositories: by "owner/name".
        objects: verified large objects by sha256.
        uploaded: what was put to the storage server under a name and is not verified yet.
    """

    users: Mapping[str, str]
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    uploaded: dict[str, bytes] = field(default_factory=dict)

    def user(self, token: str | None) -> str | None:
        """Returns who sent a token, None without one."""
        if token is None:
            return None
        if token not in self.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.users[token]

    def repository(self, name: str, user: str | None, *, write: bool = False) -> Repository:
        """Returns a repository that a user may read, or write."""
        found, owner = self.repositories.get(name), name.partition("/")[0]
        if found is None or (found.private and user != owner):
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self.require_owner(user, owner)
        return found

    def require_owner(self, user: str | None, namespace: str) -> None:
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if user != namespace:
            raise HubError(403, f"You don't have the rights to write to the namespace {namespace!r}")

    def create(self, name: str, *, private: bool = False) -> Repository:
        if name in self.repositories:
            raise HubError(409, "You already created this model repo")
        repository = self.repositories[name] = Repository(name, private)
        attributes = "".join(f"*{end} filter=lfs diff=lfs merge=lfs -text\n" for end in LARGE)
        repository.commit(MAIN, "initial commit", {".gitattributes": Blob(attributes.encode(), large=False)})
        return repository

    def verify(self, oid: str, size: int) -> None:
        """Takes an upload over, if it is what its name and size say."""
        content = self.uploaded.pop(oid, None)
        if content is None and oid in self.objects:
            content = self.objects[oid]
        if content is None:
            raise HubError(404, f"object {oid} was not uploaded")
        if len(content) != size or hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, f"object {oid} has another size or sha256")
        self.objects[oid] = content

    def apply(self, repository: Repository, branch: str, lines: Iterable[Mapping[str, Any]]) -> Commit:
        """Commits the operations of a request, all of them or none."""
        if branch not in repository.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        files, title = dict(repository.head(branch).files), ""
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    title, parent = value["summary"], value.get("parentCommit")
                    if parent not in (None, repository.branches[branch]):
                        raise HubError(412, "A commit has happened since. Please refresh and try again.")
                case "file":
                    files[_safe(value["path"])] = Blob(base64.b64decode(value["content"]), large=False)
                case "lfsFile" if value["oid"] in self.objects:
                    files[_safe(value["path"])] = Blob(self.objects[value["oid"]], large=True)
                case "lfsFile":
                    raise HubError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                case "deletedFile":
                    files.pop(value["path"])
                case "deletedFolder":
                    folder = value["path"].rstrip("/") + "/"
                    files = {path: blob for path, blob in files.items() if not path.startswith(folder)}
                case other:
                    raise HubError(400, f"unknown operation {other!r}")
        return repository.commit(branch, title, files)


def _safe(path: str) -> str:
    if path.startswith("/") or ".." in path.split("/"):
        raise HubError(400, f"invalid path {path!r}")
    return path
