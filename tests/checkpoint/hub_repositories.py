"""What a small Hub keeps: repositories as lists of commits, files with the ids that the Hub gives them, and what a card says of itself."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml

#: What the Hub calls large whatever a repository's ``.gitattributes`` says, and above how many bytes it calls everything large.
_LARGE = (".safetensors", ".bin")
_LARGEST_REGULAR = 10_000_000

#: The first commit of every repository that is created on the Hub.
FIRST_ATTRIBUTES = b"".join(b"*%s filter=lfs diff=lfs merge=lfs -text\n" % suffix.encode() for suffix in _LARGE)


@dataclass(frozen=True)
class Blob:
    """One version of a file, with the ids that the Hub gives it. Weights count as large files (LFS)."""

    data: bytes
    large: bool

    @cached_property
    def git_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.git_id

    @property
    def lfs(self) -> dict[str, Any]:
        """What listings say of a large file beside the rest."""
        return {"size": len(self.data), "pointerSize": 134}


Tree = dict[str, Blob]


@dataclass
class Repository:
    """Commits, oldest first, as whole trees; branches by name. A private one is there for tokens of its namespace only."""

    name: str = ""
    commits: dict[str, Tree] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    last_modified: str = "2026-11-28T12:00:00.000Z"

    def resolve(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None

    def head(self, branch: str = "main") -> Tree:
        """The files of a branch now."""
        return self.commits.get(self.branches.get(branch, ""), {})

    def add(self, tree: Tree, branch: str = "main", message: str = "") -> str:
        """A commit of exactly these files; its hash."""
        named = [self.name, len(self.commits), sorted((path, blob.git_id) for path, blob in tree.items())]
        commit = hashlib.sha1(json.dumps(named).encode()).hexdigest()
        self.commits[commit] = tree
        self.branches[branch] = commit
        self.messages[commit] = message
        return commit

    def is_large(self, path: str, data: bytes, size: int | None = None) -> bool:
        """Whether the Hub takes a file by LFS: as the head's ``.gitattributes`` say, or for its size, or because it is no text."""
        attributes = self.head().get(".gitattributes", Blob(b"", large=False)).data.decode()
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        if any(_matches(path, pattern) for pattern in patterns) or path.endswith(_LARGE):
            return True
        return (len(data) if size is None else size) > _LARGEST_REGULAR or b"\0" in data[:512]

    def card(self, commit: str) -> dict[str, Any]:
        """The metadata of a commit's README.md."""
        readme = self.commits[commit].get("README.md")
        return front_matter(readme.data.decode()) or {} if readme is not None else {}

    def info(self, commit: str) -> dict[str, Any]:
        """What the Hub says of a repository, but for its files."""
        card = self.card(commit)
        bases = card.get("base_model") or []
        bases = [bases] if isinstance(bases, str) else bases
        relation = card.get("base_model_relation")
        tags = list(card.get("tags") or [])
        tags += [card["library_name"]] if "library_name" in card and card["library_name"] not in tags else []
        tags += [f"license:{card['license']}"] if "license" in card else []
        tags += [f"base_model:{base}" for base in bases]
        tags += [f"base_model:{relation}:{base}" for base in bases if relation]
        return {
            "id": self.name,
            "modelId": self.name,
            "author": self.name.split("/")[0],
            "sha": commit,
            "lastModified": self.last_modified,
            "createdAt": self.last_modified,
            "private": self.private,
            "gated": "manual" if self.gated else False,
            "library_name": card.get("library_name"),
            "tags": tags,
            "cardData": card,
        }


def front_matter(text: str) -> dict[str, Any] | None:
    """The YAML at the head of a card; None where there is none. Raises yaml.YAMLError."""
    if not text.startswith("---\n") or "\n---\n" not in text[4:]:
        return None
    found = yaml.safe_load(text[4:].split("\n---\n")[0])
    return found if isinstance(found, dict) else None


def _matches(path: str, pattern: str) -> bool:
    """A pattern of ``.gitattributes``: of the file's name, or with a slash in it of the whole path; ``**`` is any depth."""
    if "/" not in pattern:
        return fnmatch.fnmatchcase(path.rpartition("/")[2], pattern)
    parts = pattern.removeprefix("/").split("/")
    return _match_parts(path.split("/"), parts)


def _match_parts(path: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_match_parts(path[skip:], pattern[1:]) for skip in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _match_parts(path[1:], pattern[1:])
