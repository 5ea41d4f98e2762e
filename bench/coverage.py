"""Prunes every model of a list to half of its MACs with no hints, and checks what came out: `python bench/coverage.py --out FILE.jsonl`.

A list has `lib:name:HxW` lines (lib: torchvision or timm; random weights); the default is `bench/zoo.txt`. Every model has a process of its
own, so that a crash or a blow-up of memory is one row. Rows that are in `--out` already are kept, so a sweep can be continued.
Exits with status 1 if any model fails.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHARE = 0.5
GRIDS = (8, 4, 2, 1)  # the grid of widths asked for first, and the finer ones tried where it does not reach the target
CHECKS = ("verified", "own_class", "train_step", "train_eval", "saved_loaded", "onnx")
Row = dict[str, Any]


# --- one model ------------------------------------------------------------------------------------------------------


def build_model(lib: str, name: str) -> Any:
    import torch

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if lib == "timm":
            import timm

            return timm.create_model(name, pretrained=False).eval()
        from torchvision import models

        options = {"weights_backbone": None} if family(name) in ("detection", "segmentation") else {}
        return models.get_model(name, weights=None, **options).eval()


def family(name: str) -> str:
    """The torchvision family that `name` belongs to: detection, segmentation, video, optical_flow, or classification."""
    from torchvision import models

    package = str(models.get_model_builder(name).__module__).split(".")
    return next((f for f in ("detection", "segmentation", "video", "optical_flow") if f in package), "classification")


def example_inputs(lib: str, name: str, size: tuple[int, int], batch: int) -> tuple[Any, ...]:
    """The arguments of the model's forward pass: images, clips, pairs of images, or a list of images."""
    import torch

    torch.manual_seed(batch)
    kind = family(name) if lib == "torchvision" else "classification"
    if kind == "video":
        side = 224 if name in ("mvit_v2_s", "swin3d_t", "s3d") else 112
        return (torch.randn(batch, 3, 16, side, side),)
    if kind == "optical_flow":
        return (torch.rand(batch, 3, 128, 128) * 2 - 1, torch.rand(batch, 3, 128, 128) * 2 - 1)
    if kind == "detection":
        return ([torch.rand(3, *size) for _ in range(batch)],)
    return (torch.randn(batch, 3, *size),)


def training_inputs(lib: str, name: str, size: tuple[int, int], model: Any) -> tuple[Any, ...]:
    """Two samples where there is a BatchNorm (over a single value it refuses to train), and for detectors the targets too."""
    import torch

    norms = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())
    inputs = example_inputs(lib, name, size, 2 if norms or (lib == "torchvision" and family(name) == "detection") else 1)
    if lib != "torchvision" or family(name) != "detection":
        return inputs
    height, width = size
    target = {
        "boxes": torch.tensor([[0.1 * width, 0.2 * height, 0.7 * width, 0.9 * height], [5.0, 5.0, width / 2, height / 2]]),
        "labels": torch.tensor([1, 1]),
        "masks": torch.ones(2, height, width, dtype=torch.uint8),
        "keypoints": torch.tensor([[[width * 0.3, height * 0.4, 1.0]] * 17] * 2),
    }
    return (*inputs, [target, copy.deepcopy(target)])


def float_outputs(output: Any) -> list[Any]:
    import torch
    from torch.utils._pytree import tree_flatten

    return [t for t in tree_flatten(output)[0] if isinstance(t, torch.Tensor) and t.is_floating_point()]


def gradients(model: Any, inputs: tuple[Any, ...]) -> dict[str, bool]:
    """One training step on a copy: the parameters that got a gradient, and whether it is finite."""
    import torch

    torch.manual_seed(0)
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = sum(t.square().mean() for t in float_outputs(model(*inputs)) if t.requires_grad)
    loss.backward()  # type: ignore[union-attr]
    optimizer.step()
    return {n: bool(p.grad.isfinite().all()) for n, p in model.named_parameters() if p.grad is not None}


def check_training(dense: Any, pruned: Any, inputs: tuple[Any, ...]) -> str | None:
    """What is wrong with a training step of `pruned`; None if nothing is that is not wrong with the dense model too."""
    found = gradients(pruned, inputs)
    suspects = [n for n, _ in pruned.named_parameters() if not found.get(n, False)]
    if suspects:
        wanted = gradients(dense, inputs)
        suspects = [n for n in suspects if wanted.get(n, False)]
    return f"no finite gradient in {suspects[0]} and {len(suspects) - 1} more" if suspects else None


def evaluated(model: Any, inputs: tuple[Any, ...]) -> list[Any]:
    import torch

    with torch.no_grad():
        return float_outputs(model(*inputs))


def same_bits(a: list[Any], b: list[Any]) -> bool:
    import torch

    return len(a) == len(b) and all(
        x.shape == y.shape and torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) for x, y in zip(a, b, strict=True)
    )


def check_saved(dense: Any, pruned: Any, plan: Any, inputs: tuple[Any, ...]) -> str | None:
    """Save as safetensors, load into a fresh dense model with the plan's JSON, compare bit for bit."""
    from safetensors.torch import load_file, save_model

    import coppice
    from coppice.torch.apply import build

    with tempfile.TemporaryDirectory() as folder:
        save_model(pruned, f"{folder}/model.safetensors")
        again = build(dense, coppice.Plan.from_json(plan.to_json()), load_file(f"{folder}/model.safetensors")).eval()
    return None if same_bits(evaluated(pruned, inputs), evaluated(again, inputs)) else "loaded, it gives other outputs"


def check_train_eval(pruned: Any, inputs: tuple[Any, ...]) -> str | None:
    before = evaluated(pruned, inputs)
    pruned.train()
    pruned.eval()
    return None if same_bits(before, evaluated(pruned, inputs)) else "train() and eval() change its outputs"


def onnx_error(model: Any, inputs: tuple[Any, ...]) -> float:
    """Export, run with ONNX Runtime, and compare: the largest difference relative to the largest output."""
    import onnxruntime
    import torch
    from torch.utils._pytree import tree_flatten

    from coppice.torch.capture import capture, decisions_of
    from coppice.verification import largest_error

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        try:
            torch.onnx.export(model, inputs, path, dynamo=True, verbose=False)
        except Exception:  # the exporter's errors have no common base
            if decisions_of(capture(model, inputs)):  # which the older one would freeze
                raise
            torch.onnx.export(model, inputs, path, dynamo=False, verbose=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        tensors = [t for t in tree_flatten(inputs)[0] if isinstance(t, torch.Tensor)]
        names = [i.name for i in session.get_inputs()]
        got = session.run(None, {n: t.numpy() for n, t in zip(names, tensors, strict=True)})
    want = [t for t in tree_flatten(model(*inputs))[0] if isinstance(t, torch.Tensor)]
    pairs = [(torch.from_numpy(a), b) for a, b in zip(got, want, strict=True) if b.is_floating_point()]
    return largest_error(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in pairs)


def check_onnx(dense: Any, pruned: Any, inputs: tuple[Any, ...]) -> str | None:
    """None if the pruned model exports and agrees, `dense` if not even the dense model does, else what went wrong."""
    import torch

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            error = onnx_error(pruned, inputs)
            if error <= 1e-3:  # no NaN
                return None
            fault = f"off by {error:.1e}"
        except Exception as raised:  # the exporter's errors have no common base
            fault = f"{type(raised).__name__}: {raised}"
        try:
            if not onnx_error(dense, inputs) <= 1e-3:
                return "dense"
        except Exception:
            return "dense"
    return fault


def commit() -> str:
    """The commit of the code that runs."""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def choose_plan(coppice: Any, coupling: Any, scores: Any) -> tuple[Any, int, str | None]:
    """A plan for half of the MACs, on the coarsest grid that reaches it; where none does, the smallest, and the reason."""
    dense = coupling.cost().macs
    reason = ""
    for grid in GRIDS:
        try:
            return coppice.plan(coupling, scores, {"macs": SHARE * dense}, round_to=grid, min_width=grid), grid, None
        except coppice.CoppiceError as error:
            reason = str(error)
    from coppice.allocate import smallest

    least = smallest(coupling, 1, 1).macs
    return coppice.plan(coupling, scores, {"macs": min(least * 1.02 + 1, dense)}, round_to=1, min_width=1), 1, reason


def prune_one(line: str, onnx: bool, quick: bool = False) -> Row:
    """Everything about one model. Each stage that fails says so in the row, and the stages after it that can run still do."""
    import torch

    import coppice

    lib, name, size = parse_line(line)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    row: Row = {"name": line, "error": None, "verified": False, "commit": commit()}
    model = build_model(lib, name)
    inputs = example_inputs(lib, name, size, 1)
    row["model_mb"] = sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 2**20
    row["base_mb"] = peak_mb()
    start = time.perf_counter()

    def stage(what: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        try:
            result = work()
        except Exception as error:
            raise StageError(what, error) from error
        row.setdefault("stages", {})[what] = round(time.perf_counter() - began, 2)
        row.setdefault("peaks_mb", {})[what] = round(peak_mb())
        return result

    try:
        graph = stage("capture", lambda: coppice.capture(model, inputs))
        coupling = stage("couple", lambda: coppice.couple(graph))
        row |= describe(model, coupling)
        scores = stage("score", lambda: coppice.score(model, coupling, "l1"))
        plan, row["grid"], row["missed"] = stage("plan", lambda: choose_plan(coppice, coupling, scores))
        pruned = stage("apply", lambda: coppice.apply(model, plan))
        row["seconds"] = round(time.perf_counter() - start, 2)
        ids = {a.name: a.id for a in coupling.axes}
        dense, cost = coupling.cost(), coupling.cost({ids[a.name]: len(a.keep) for a in plan.axes})
        row |= {"macs": dense.macs, "macs_ratio": round(cost.macs / max(dense.macs, 1), 4), "params": dense.params}
        row["params_ratio"] = round(sum(p.numel() for p in pruned.parameters()) / max(1, sum(p.numel() for p in model.parameters())), 4)
        if quick:
            stage("forward", lambda: evaluated(pruned, inputs))
            return row
        found = stage("verify", lambda: coppice.verify(model, pruned, coupling, plan))
        row |= {"verified": True, "max_error": found.max_error, "detour": found.detour}
        row["own_class"] = type(pruned) is type(model)
        for check, work in (
            ("train_eval", lambda: check_train_eval(pruned, inputs)),
            ("saved_loaded", lambda: check_saved(model, pruned, plan, inputs)),
            ("train_step", lambda: check_training(model, pruned, training_inputs(lib, name, size, model))),
            *((("onnx", lambda: check_onnx(model, pruned, inputs)),) if onnx else ()),
        ):
            fault = stage(check, work)
            row[check] = fault if fault == "dense" else fault is None
            if fault not in (None, "dense"):
                row["error"] = row["error"] or f"{check}: {fault}"
    except StageError as error:
        row["error"] = str(error)
        row["trace"] = traceback.format_exc()[-3000:]
    row["total_seconds"] = round(time.perf_counter() - start, 2)
    row["peak_mb"] = round(peak_mb())
    return row


class StageError(Exception):
    def __init__(self, stage: str, error: Exception) -> None:
        text = re.sub(r"\s+", " ", str(error))
        super().__init__(f"{stage}: {type(error).__name__}: {text[:400]}")


def describe(model: Any, coupling: Any) -> Row:
    """How much of the model may be cut, and why the rest may not."""
    names = dict(model.named_parameters())
    on_axis = {site for axis in coupling.prunable for site, _ in axis.sites}
    total = sum(p.numel() for p in names.values())
    return {
        "ops": len(coupling.graph.ops),
        "axes": len(coupling.axes),
        "prunable": len(coupling.prunable),
        "prunable_share": round(sum(p.numel() for n, p in names.items() if n in on_axis) / max(total, 1), 4),
        "pins": {reason: len(axes) for reason, axes in sorted(coupling.pins.items(), key=lambda item: -len(item[1]))},
    }


# --- the sweep ------------------------------------------------------------------------------------------------------


def parse_line(line: str) -> tuple[str, str, tuple[int, int]]:
    lib, name, size = line.split(":")
    height, width = size.split("x")
    return lib, name, (int(height), int(width))


def _child(line: str, onnx: bool, quick: bool, sender: Any) -> None:
    """Runs in the model's own process; the row goes back through the pipe."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - some exporters print
    sender.send(prune_one(line, onnx, quick))


def run_line(line: str, onnx: bool, quick: bool, timeout: float) -> Row:
    """The row of one model, from a process of its own, forked from one that has the libraries imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "timm", "coppice", "coppice.torch.sizes", "coppice.torch.verify"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(line, onnx, quick, sender))
    start = time.perf_counter()
    process.start()
    sender.close()
    row: Row = {"name": line, "verified": False, "error": f"took longer than {timeout:.0f} s"}
    try:
        if receiver.poll(timeout):
            row = dict(receiver.recv())
        else:
            process.kill()
    except EOFError:
        process.join()
        row["error"] = f"crash: the process ended with status {process.exitcode}"
    process.join()
    row["total_seconds"] = round(time.perf_counter() - start, 2)
    return row


def passed(row: Row) -> bool:
    return bool(row["verified"]) and not row["error"] and not row.get("missed")


def table(rows: list[Row], about: str) -> str:
    """The rows as Markdown, totals first."""
    verified = [r for r in rows if r["verified"]]
    met = [r for r in verified if not r.get("missed")]
    shares = sorted(r["prunable_share"] for r in verified)
    median = shares[len(shares) // 2] if shares else 0.0
    commits = Counter(r.get("commit") or "an earlier one" for r in rows)
    made_on = ", ".join(f"{name} ({count})" for name, count in commits.most_common())
    lines = [
        f"{len(verified)} of {len(rows)} models pruned and verified; {len(met)} reach {SHARE} × MACs "
        f"({sum(r['grid'] == GRIDS[0] for r in met)} of them on widths of multiples of {GRIDS[0]}); "
        f"{sum(map(passed, rows))} pass every check; median share of parameters on prunable axes {median:.1%}; "
        f"{sum(r.get('seconds', 0) for r in verified):.0f} s from capture to the pruned model in all. "
        f"Commits that the rows were made on: {made_on}. {about}".rstrip(),
        "",
        "| model | verified | MACs × | grid | params × | prunable | pinned axes: reasons | s | peak MB | train | save | ONNX | note |",
        "|---|---|---:|---:|---:|---:|---|---:|---:|---|---|---|---|",
    ]
    return "\n".join(lines + [_table_row(r) for r in rows])


def _table_row(row: Row) -> str:
    def tick(key: str) -> str:
        value = row.get(key)
        return "" if value is None else "dense fails" if value == "dense" else "yes" if value else "**no**"

    pins = {k: n for k, n in row.get("pins", {}).items() if k not in ("model input", "model output")}
    reasons = "; ".join(f"{n}: {reason}" for reason, n in list(pins.items())[:3]) + ("; …" if len(pins) > 3 else "")
    note = row["error"] or row.get("missed") or (f"other way at {row['detour']}" if row.get("detour") else "")
    cells = [
        row["name"].rpartition(":")[0], tick("verified"), f"{row.get('macs_ratio', math.nan):.3f}", row.get("grid", ""),
        f"{row.get('params_ratio', math.nan):.3f}", f"{row.get('prunable_share', math.nan):.1%}", reasons[:200], row.get("seconds", ""),
        row.get("peak_mb", ""), tick("train_step"), tick("saved_loaded"), tick("onnx"), note[:200],
    ]  # fmt: skip
    return "| " + " | ".join(str(c).replace("|", "/").replace("\n", " ") for c in cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--list", type=Path, default=HERE / "zoo.txt", help="a file of lib:name:HxW lines")
    parser.add_argument("--only", help="a regular expression that a line must contain")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=300, help="seconds a model")
    parser.add_argument("--onnx", action="store_true", help="also export to ONNX and compare with ONNX Runtime")
    parser.add_argument("--quick", action="store_true", help="stop after one forward pass of the pruned model: nothing is verified")
    parser.add_argument("--out", type=Path, help="a JSONL file, one row a model; models that are in it are not run again")
    parser.add_argument("--again", action="store_true", help="run models that are in --out again")
    parser.add_argument("--table", type=Path, help="write the Markdown table here")
    parser.add_argument("--about", default="", help="a sentence to put above the table")
    args = parser.parse_args()
    every = [text.strip() for text in args.list.read_text().splitlines() if text.strip() and not text.startswith("#")]
    rows: dict[str, Row] = {}
    if args.out is not None and args.out.exists():
        rows = {r["name"]: r for r in map(json.loads, args.out.read_text().splitlines())}
    todo = [x for x in every if (args.only is None or re.search(args.only, x)) and (args.again or x not in rows)]
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(lambda x: run_line(x, args.onnx, args.quick, args.timeout), todo):
            rows[row["name"]] = row
            print(_table_row(row), file=sys.stderr, flush=True)
            if args.out is not None:
                ordered = [rows[x] for x in every if x in rows]
                args.out.write_text("".join(json.dumps(r) + "\n" for r in ordered))
    shown = [rows[x] for x in every if x in rows and (args.only is None or re.search(args.only, x))]
    text = table(shown, args.about)
    print(text)
    if args.table is not None:
        args.table.write_text(text + "\n")
    return int(not all(map(passed, shown)))


if __name__ == "__main__":
    sys.exit(main())
