"""What a small Hub does with requests that write: repositories created, large files asked for, commits made of them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import yaml

from tests.checkpoint.hub_repositories import FIRST_ATTRIBUTES, Blob, Repository, front_matter

#: What the Hub takes for ``base_model_relation``.
_RELATIONS = ("adapter", "merge", "quantized", "finetune")


class RefusedError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


def created(repositories: dict[str, Repository], asked: dict[str, Any], namespaces: frozenset[str], url: str) -> object:
    """``POST /api/repos/create``: a repository with the Hub's own first commit; 409 where there is one."""
    name = f"{asked['organization'] or min(namespaces)}/{asked['name']}"
    if name.split("/")[0] not in namespaces:
        raise RefusedError(403, "You don't have the rights to create a model under this namespace")
    if name in repositories:
        raise RefusedError(409, "You already created this model repo")
    repository = repositories[name] = Repository(name, private=asked.get("visibility") == "private")
    repository.add({".gitattributes": Blob(FIRST_ATTRIBUTES, large=False)}, message="initial commit")
    return {"url": f"{url}/{name}", "id": name}


def validated_card(text: str) -> object:
    """``POST /api/validate-yaml``: 400 for metadata that the Hub does not take."""
    errors = []
    try:
        card = front_matter(text) or {}
    except yaml.YAMLError as cause:
        card, errors = {}, [str(cause)]
    bases = card.get("base_model", [])
    if not all(isinstance(base, str) and base.count("/") == 1 for base in ([bases] if isinstance(bases, str) else bases)):
        errors.append("base_model must be one or more model ids")
    if card.get("base_model_relation", "adapter") not in _RELATIONS:
        errors.append(f"base_model_relation must be one of {_RELATIONS}")
    if not all(isinstance(tag, str) for tag in card.get("tags", [])) or not isinstance(card.get("license", ""), str | list):
        errors.append("tags and license must be text")
    if errors:
        raise RefusedError(400, "; ".join(errors))
    return {"errors": [], "warnings": []}


def upload_modes(repository: Repository, asked: dict[str, Any], revision: str) -> object:
    """``POST …/preupload/REVISION``: which files go by LFS, and what the head holds under their names."""
    if repository.resolve(revision) is None:
        raise RefusedError(404, "Invalid rev id", "RevisionNotFound")
    head, modes = repository.head(revision), []
    for file in asked["files"]:
        large = repository.is_large(file["path"], base64.b64decode(file["sample"]), file["size"])
        held = head.get(file["path"])
        modes.append(
            {
                "path": file["path"],
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": False,
                "oid": held.etag if held is not None else None,
            }
        )
    return {"files": modes}


def lfs_batch(asked: dict[str, Any], is_held: Callable[[str], bool], storage: str, repository: str) -> object:
    """``POST ….git/info/lfs/objects/batch``: where each object is to be put; nothing for those that are there."""
    objects = []
    for one in asked["objects"]:
        actions = {
            "upload": {"href": f"{storage}/storage/{one['oid']}"},
            "verify": {"href": f"{repository}.git/info/lfs/objects/verify"},
        }
        objects.append({**one, **({} if is_held(one["oid"]) else {"actions": actions})})
    return {"transfer": "basic", "objects": objects}


def commit_of(repository: Repository, data: bytes, branch: str, blob: Callable[[str], Blob | None]) -> str:
    """``POST …/commit/BRANCH``: all operations, or none of them. 412 where the branch is not where ``parentCommit`` says."""
    operations = [json.loads(line) for line in data.splitlines()]
    header = operations[0]["value"]
    if branch not in repository.branches:
        raise RefusedError(404, "Invalid rev id", "RevisionNotFound")
    if header.get("parentCommit") not in (None, repository.branches[branch]):
        raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
    tree = dict(repository.head(branch))
    for operation in operations[1:]:
        value = operation["value"]
        match operation["key"]:
            case "file":
                tree[value["path"]] = Blob(base64.b64decode(value["content"]), large=False)
            case "lfsFile":
                held = blob(value["oid"])
                if held is None or len(held.data) != value["size"]:
                    raise RefusedError(400, f"{value['path']}: its LFS object was not uploaded")
                tree[value["path"]] = held
            case "deletedFile":
                if tree.pop(value["path"], None) is None:
                    raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
            case "deletedFolder":
                gone = [path for path in tree if path.startswith(f"{value['path'].rstrip('/')}/")]
                for path in gone:
                    del tree[path]
            case other:
                raise RefusedError(400, f"{other}: no operation")
    return repository.add(tree, branch, header["summary"])
