"""The run folder: everything a run knows is on disk, and every write is all or nothing.

    config.toml     the settings, versions and machine            journal.json   finished stages and what they found
    state/          weights between stages, gone when it is done   lock           held by the process that works on the run
    plan.json  model.safetensors  model.onnx  metrics.json  report.html           the outputs
    model.sparse.safetensors       with masks                      model-int8.onnx   with int8
    manifest.json   SHA-256 of each, written last: a run that has it is complete

A stage is computed once: its result goes into the journal after the weights it refers to are safely on disk, so a process killed at any
moment leaves a run whose journal is true. A resumed run reads what the stages before it stored, and so does an undisturbed one: both see
the same bits. No pickle anywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coppice.config import RunConfig, dump_config, load_config, sha256
from coppice.errors import CoppiceError
from coppice.parallel import current

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG, JOURNAL, LOCK, MANIFEST, STATE = "config.toml", "journal.json", "lock", "manifest.json", "state"
PLAN, MODEL, ONNX, METRICS, REPORT = "plan.json", "model.safetensors", "model.onnx", "metrics.json", "report.html"
SPARSE = "model.sparse.safetensors"  # where weights are masked: the same weights in a smaller file (coppice.sparse_file)
INT8 = "model-int8.onnx"  # where it is asked for
KERAS = "model.keras"  # of a Keras model, in place of all these
OUTPUTS = (PLAN, MODEL, SPARSE, KERAS, ONNX, INT8, METRICS, REPORT)

Json = dict[str, Any]


class Run:
    """An open run folder, locked by this process. Made by `create_run` or `resume_run`; use it as a context manager.

    Of several processes (`coppice.parallel`) the first holds the lock and writes; the others follow its journal: see `opened`.
    """

    def __init__(self, path: Path, config: RunConfig, lock: int | None, journal: Json | None = None) -> None:
        self.path = path
        self.config = config
        self._lock = lock
        written = path / JOURNAL
        self._journal: Json = journal if journal is not None else read_json(written) if written.exists() else {}
        if not all(isinstance(entry, dict) and entry.keys() >= {"result", "seconds"} for entry in self._journal.values()):
            raise CoppiceError(f"{written} is not as the run wrote it, start the run again in another folder")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)

    @property
    def complete(self) -> bool:
        return (self.path / MANIFEST).exists()

    def stage(self, name: str, compute: Callable[[], Json], *, shared: bool = False) -> Json:
        """The result of a stage: from the journal, or computed now and journalled. Always what JSON gives back, seconds included.

        `shared`: all processes compute it together; else the first does, without asking for other stages, and tells the others.
        """
        if name not in self._journal:
            began = time.perf_counter()
            found = compute() if shared else None

            def journalled() -> Json:
                result = json.loads(json.dumps(found if shared else compute()))
                entry = {"result": result, "seconds": round(time.perf_counter() - began, 3)}
                write_text(self.path / JOURNAL, json.dumps({**self._journal, name: entry}, indent=1))
                return entry

            self._journal[name] = current().first(journalled)
        entry: Json = self._journal[name]["result"]
        return entry

    def seconds(self) -> dict[str, float]:
        """Wall-clock time of each finished stage (work that was killed half-way is not in it)."""
        return {name: entry["seconds"] for name, entry in self._journal.items()}

    def save_state(self, name: str, tensors: Mapping[str, Tensor]) -> Json:
        """Store weights between stages; the answer goes into the stage's result, `load_state` takes it back."""
        path = self.state_path(name)

        def written() -> Json:
            write_tensors(path, tensors)
            return {"file": path.name, "sha256": sha256(path)}

        return current().first(written)

    def discard(self, name: str) -> None:
        """Remove what a stage kept at `state_path`."""
        current().first(lambda: self.state_path(name).unlink(missing_ok=True))

    def load_state(self, reference: Mapping[str, str]) -> dict[str, Tensor]:
        path = self.path / STATE / reference["file"]
        if not path.exists() or sha256(path) != reference["sha256"]:
            raise CoppiceError(f"{path} is missing or changed since the run wrote it, start the run again in another folder")
        return read_tensors(path)

    def state_path(self, name: str) -> Path:
        """Where a stage may keep a checkpoint of its own while it is under way."""
        (self.path / STATE).mkdir(exist_ok=True)
        return self.path / STATE / (re.sub(r"[^A-Za-z0-9.]+", "-", name) + ".safetensors")

    def finish(self) -> None:
        """Seal the outputs with the manifest, then clear what was only needed on the way."""
        present = [name for name in (CONFIG, *OUTPUTS) if (self.path / name).exists()]
        write_text(self.path / MANIFEST, json.dumps({name: sha256(self.path / name) for name in present}, indent=1) + "\n")
        shutil.rmtree(self.path / STATE, ignore_errors=True)


def opened(make: Callable[[], Run]) -> Run:
    """The run that `make` opens, which only the first process does. Raises CoppiceError where another does not see its folder."""
    own: list[Run] = []

    def first() -> tuple[Path, RunConfig, Json]:
        own.append(make())
        return own[0].path.resolve(), own[0].config, own[0]._journal

    path, config, journal = current().first(first)
    if own:
        return own[0]
    if not (path / CONFIG).exists():
        raise CoppiceError(f"process {current().rank} does not see {path}: all processes need the same file system")
    return Run(path, config, None, journal)


def create_run(path: Path, config: RunConfig) -> Run:
    """A new run in `path`, or the same run again if it is there already. Raises CoppiceError if the folder holds anything else."""
    check_out(path, config)
    if (path / CONFIG).exists():
        return resume_run(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CoppiceError(f"--out {path} can't be made ({error.strerror}), name another folder") from error
    lock = _take_lock(path)
    write_text(path / CONFIG, dump_config(config))
    return Run(path, config, lock)


def check_out(path: Path, config: RunConfig) -> None:
    """Raise CoppiceError unless a run with these settings may begin or go on in `path`: nothing else is ever written over."""
    if not path.exists():
        return
    if not path.is_dir():
        raise CoppiceError(f"--out {path} is a file, name a new folder")
    if (path / CONFIG).exists():
        if load_config(path / CONFIG)[0] != config:
            raise CoppiceError(f"--out {path} holds a run with other settings, name a new folder or continue it with --resume {path}")
    elif {p.name for p in path.iterdir()} - {LOCK} - _temporaries(path):  # those two: killed before it wrote its configuration
        raise CoppiceError(f"--out {path} is not empty and holds no run, name a new folder")


def _temporaries(path: Path) -> set[str]:
    return {p.name for p in path.glob(".tmp-*")}


def resume_run(path: Path) -> Run:
    """An existing run. Raises CoppiceError if there is none, another process holds it, or its model file or weights have changed."""
    if not (path / CONFIG).exists():
        raise CoppiceError(f"--resume {path}: no run there (no {CONFIG})")
    config, records = load_config(path / CONFIG)
    lock = _take_lock(path)
    try:
        now = config.fingerprints()
        for name, digest in records["inputs"].items():
            if now.get(name) != digest and not (path / MANIFEST).exists():
                which = {"weights": config.weights, "code": config.code}.get(name, config.model)
                raise CoppiceError(f"--resume {path}: {which} is gone or has changed since the run began, start a new run")
        for leftover in _temporaries(path):
            (path / leftover).unlink()
        if (path / MANIFEST).exists():
            shutil.rmtree(path / STATE, ignore_errors=True)
        return Run(path, config, lock)
    except BaseException:
        os.close(lock)
        raise


def _take_lock(path: Path) -> int:
    """An exclusive lock that the system drops when its holder dies, so a killed run never has to be unlocked by hand."""
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock_exclusively(descriptor)
    except OSError:
        holder = os.read(descriptor, 32).decode(errors="replace").strip()
        os.close(descriptor)
        raise CoppiceError(f"{path} is in use by process {holder or 'unknown'}, wait for it or stop it") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def _lock_exclusively(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what is written there takes its place, whole and flushed to the disk, or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private to the user
        os.replace(temporary, path)
        _flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush_folder(path: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_new_file(path: Path) -> None:
    """Raise CoppiceError unless a file named with --out can be made there: to be asked before the work."""
    if path.exists():
        raise CoppiceError(f"--out {path} exists already, name another file")
    if not path.parent.is_dir():
        raise CoppiceError(f"--out {path}: there is no folder {path.parent}")


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CoppiceError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CoppiceError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CoppiceError(f"{path} should hold a JSON object")
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file. Tied weights are stored once a name (the format refuses shared memory), so loading needs no rule for them."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, temporary)


def read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CoppiceError(f"{path} can't be read as safetensors: {error}") from error


def check_manifest(path: Path) -> dict[str, str]:
    """The manifest of a complete run. Raises CoppiceError naming what is missing or not as it was written."""
    if not (path / CONFIG).exists():
        raise CoppiceError(f"{path} is no run folder (no {CONFIG})")
    if not (path / MANIFEST).exists():
        raise CoppiceError(f"{path} is not finished, continue it with: coppice prune --resume {path}")
    manifest = read_json(path / MANIFEST)
    missing = [name for name in manifest if not (path / name).exists()]
    changed = [name for name in manifest if name not in missing and sha256(path / name) != manifest[name]]
    if missing or changed:
        said = [f"{', '.join(missing)} missing"] * bool(missing) + [f"{', '.join(changed)} changed or truncated"] * bool(changed)
        raise CoppiceError(f"{path} is not as it was written ({'; '.join(said)}), restore it or run it again")
    return manifest


def load(run: str | Path, model: nn.Module | None = None) -> Any:
    """The pruned model of a finished run, in eval mode, bit-identical to the one that was saved.

    Rebuilt from the factory that the run's configuration names (user code runs, nothing is unpickled), `plan.json` and `model.safetensors`.
    A Keras model is read from `model.keras`, by Keras.
    `model`: a freshly made dense model, instead of calling the factory; needed when the run was started from Python with a module.
    Raises CoppiceError if the folder is unfinished, damaged, or the model does not fit the plan.
    """
    path = Path(run)
    check_manifest(path)
    config, _ = load_config(path / CONFIG)
    if (path / KERAS).exists():
        from coppice.keras.files import load_keras

        return load_keras(path / KERAS, Path(config.code) if config.code else None)
    from coppice.models import load_model
    from coppice.planning import Plan
    from coppice.torch.apply import build

    if model is None:
        if not config.model:
            raise CoppiceError(f"{path} was made from a module in Python: pass a freshly made dense one as load(run, model=...)")
        model = load_model(config.model, None, config.num_classes or None)
    plan = Plan.from_json((path / PLAN).read_text(encoding="utf-8"))
    return build(model, plan, read_tensors(path / MODEL)).eval()
