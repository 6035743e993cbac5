"""Documents that once brought a traceback, a hang or gigabytes: each is refused by name now, in little time.

``tests/data/troubles.json`` says of each which document of a bank, an unfinished build or an adapter it was, where in it, and what stood
there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import svdbank
from svdbank.bank.layout import MANIFEST
from svdbank.building.freezing import frozen_plan
from svdbank.core.errors import DamageError, SvdbankError
from tests.bank.test_fuzz import adapter, publish, use_bank
from tests.structure.source import ROOT

TROUBLES: list[dict[str, Any]] = json.loads((ROOT / "tests" / "data" / "troubles.json").read_text())


def told(value: Any) -> Any:
    """A value, or a piece of one so many times."""
    return value["value"] * value["times"] if isinstance(value, dict) and "times" in value else value


def changed(document: Any, trouble: dict[str, Any]) -> Any:
    parent = document
    for step in trouble["at"][:-1]:
        parent = parent[step]
    parent[trouble["at"][-1]] = told(trouble["value"])
    return document


def of_a_bank(trouble: dict[str, Any], folder: Path) -> Callable[[], object]:
    """The bank with the trouble in it, every hash made to fit."""
    bank = Path(shutil.copytree(ROOT / "tests" / "data" / "format-1", folder / "bank"))
    manifest = json.loads((bank / MANIFEST).read_bytes())
    index, name = json.loads((bank / manifest["index"]).read_bytes()), manifest["index"]
    if trouble["document"] == "metadata":
        (path,) = bank.glob("*/left/zarr.json")
        data = json.dumps(changed(json.loads(path.read_bytes()), trouble)).encode()
        path.write_bytes(data)
        record = index["families"][0]["metadata"][path.relative_to(bank).as_posix()]
        record.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    else:
        changed(manifest if trouble["document"] == "manifest" else index, trouble)
    publish(bank, manifest, index, name)

    def read() -> None:
        use_bank(bank)
        opened = svdbank.open(bank)
        if not (verified := svdbank.verify(bank, data=True)).sound:
            raise DamageError(str(verified.damage[0]))
        for weight in opened.names:
            opened[weight].left(4)

    return read


def of_a_build(trouble: dict[str, Any], folder: Path) -> Callable[[], object]:
    """A frozen plan with the trouble in it."""
    bank = Path(shutil.copytree(ROOT / "tests" / "data" / "format-1", folder / "bank"))
    (bank / MANIFEST).unlink()
    plan = json.loads((bank / "plan.json").read_bytes())
    (bank / "plan.json").write_text(json.dumps(changed(plan, trouble)))
    return lambda: frozen_plan(bank)


def of_an_adapter(trouble: dict[str, Any], folder: Path) -> Callable[[], object]:
    folder.joinpath("here").mkdir()
    path = adapter(folder / "here") / trouble["document"]
    path.write_text(json.dumps(changed(json.loads(path.read_bytes()), trouble)))
    return lambda: svdbank.read_adapter(path.parent)


KINDS: dict[str, Callable[[dict[str, Any], Path], Callable[[], object]]] = {
    **dict.fromkeys(("manifest", "index", "metadata"), of_a_bank),
    "plan": of_a_build,
    "adapter_config.json": of_an_adapter,
}


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble["what"].replace(" ", "-"))
def test_what_made_trouble_once_is_refused_by_name(trouble: dict[str, Any], tmp_path: Path) -> None:
    use = KINDS[trouble["document"]](trouble, tmp_path)
    begun = time.process_time()
    with pytest.raises(SvdbankError) as refused:
        use()
    assert refused.value.exit_code in (1, 2, 4) and str(refused.value)
    assert (
        time.process_time() - begun < 20
    )  # the worst of them took minutes or gigabytes; processor time, so that load does not count


def test_a_bank_of_no_weight_is_refused_by_name(tmp_path: Path) -> None:
    """Its counts fit each other and its hashes too; whoever takes the largest of its ranks found none."""
    bank = Path(shutil.copytree(ROOT / "tests" / "data" / "format-1", tmp_path / "bank"))
    manifest = json.loads((bank / MANIFEST).read_bytes())
    publish(bank, manifest | {"weights": 0, "nbytes": 0}, {"families": [], "aliases": []}, manifest["index"])
    with pytest.raises(DamageError, match="holds no weight"):
        svdbank.open(bank)
