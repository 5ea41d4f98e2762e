"""The end of a Keras run: what is saved is what was measured; every output, and one sentence on target and floor."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from coppice.config import dump_config
from coppice.deadline import SLACK as OVER
from coppice.errors import VerificationError
from coppice.floor import has_seen_validation
from coppice.keras.apply import apply, weights_in
from coppice.keras.evaluate import batches_of
from coppice.keras.files import load_keras
from coppice.keras.stages import SLACK, Bench, example_shape, materialise, test_metrics
from coppice.keras.verify import verify
from coppice.masking import check_zeros, zeros_said
from coppice.planning import Plan
from coppice.report import AxisWidth, render_report
from coppice.run import KERAS, METRICS, PLAN, REPORT, SPARSE, Json, replacing, write_text
from coppice.snapshot import Snapshot
from coppice.sparse_file import save_checked
from coppice.targets import humanise

_IMAGES = 8


def finish(bench: Bench, history: Sequence[Snapshot], reached: Snapshot) -> None:
    """Check that what is saved is what was measured, write every output, and the manifest last."""
    assert reached.plan is not None, "a run always ends with a cut"
    began, plan, model = time.perf_counter(), Plan.from_json(reached.plan), materialise(bench, reached)
    dense_test, pruned_test = test_metrics(bench, history[0]), test_metrics(bench, reached)
    met, statement = _verdict(bench, history[0], reached, dense_test, pruned_test)
    checks = [*reached.checks]
    if bench.config.steps > 1:
        with bench.progress.bar("verifying the whole plan against the dense model"):
            checks += [f"all cuts as one: {line}" for line in verify(bench.dense, apply(bench.dense, plan), bench.coupling, plan).checked]
    checks.append(_save(bench, model))
    masks, held = _masked(bench, plan, model, reached)
    metrics: Json = {
        "dense": {**dense_test, **history[0].cost, "val": dict(history[0].val)},
        "pruned": {**pruned_test, **reached.cost, "val": dict(reached.val)},
        "target": {**bench.config.target.to_dict(), "max_drop": bench.config.max_drop},
        **dict.fromkeys(("int8", "modules")),  # what only PyTorch models are asked for
        "latency": None if reached.latency is None else {**reached.latency, "dense": bench.cost.latency},
        "masks": masks,
        "regularised": reached.regularised,
        "drop": {"val": history[0].top1 - reached.top1, "test": dense_test["top1"] - pruned_test["top1"]},
        "met": met,
        "verified": True,  # what fails a check raises, and nothing is saved
        "statement": statement,
        "verification": {"checks": checks + held, "max_error": reached.max_error},
        "history": [_said(bench, step) for step in history],
        "classes": list(bench.data.classes) or [str(k) for k in range(len(dense_test["per_class"]))],
        "input": list(example_shape(bench.data)),
        "backend": keras.backend.backend(),
        "notes": [],
        "seconds": round(sum(bench.run.seconds().values()) + time.perf_counter() - began, 1),
    }
    _write(bench, plan, metrics)
    bench.run.finish()


def _save(bench: Bench, model: Any) -> str:
    """Save, load, and compare: weights bit by bit, and the outputs on real images."""
    path = bench.run.path / KERAS
    x = next(batches_of(bench.data.val, _IMAGES))[0]
    with replacing(path) as temporary:
        model.save(temporary)
        again = load_keras(temporary, Path(bench.config.code) if bench.config.code else None)
        have, want = weights_in(again), weights_in(model)
        same = have.keys() == want.keys() and all(have[name].tobytes() == want[name].tobytes() for name in want)
        if not same or not np.array_equal(model.predict_on_batch(x), again.predict_on_batch(x)):
            raise VerificationError(f"{KERAS} loaded again is not the model that was saved: a layer keeps state outside its weights")
    return f"saved and loaded again: the same bits, weights and outputs on {len(x)} images"


def _masked(bench: Bench, plan: Plan, model: Any, reached: Snapshot) -> tuple[Json | None, list[str]]:
    """What the zeros come to, and what was checked of them; the small file is written here. None where nothing is masked."""
    if not plan.weight_masks or reached.masks is None:
        return None, []
    weights, path = weights_in(model), bench.run.path / SPARSE
    checks = [check_zeros(plan, {name: weights[name] == 0 for name in plan.weight_masks}), save_checked(path, weights)]
    sizes = {"file_bytes": path.stat().st_size, "dense_file_bytes": (bench.run.path / KERAS).stat().st_size}
    return {**reached.masks, **sizes}, checks


def _said(bench: Bench, step: Snapshot) -> Json:
    seconds, cost = bench.run.seconds().get(step.stage, 0.0), step.cost
    training = [dict(entry) for entry in step.training]
    return {
        "stage": step.stage, **cost, "epochs": step.epochs, "val_top1": step.top1, "seconds": seconds,
        "repair": None if step.epochs else step.recovery, "training": training,
        "optimizer": step.optimizer, "taken": step.taken,
    }  # fmt: skip


def _write(bench: Bench, plan: Plan, metrics: Json) -> None:
    folder, config = bench.run.path, bench.config
    write_text(folder / PLAN, plan.to_json() + "\n")
    write_text(folder / METRICS, json.dumps(metrics, indent=1) + "\n")
    page = render_report(
        title=f"{Path(config.model).stem or bench.dense.name}, {metrics['pruned']['macs'] / metrics['dense']['macs']:.3f} of the MACs"
        + (f", {config.masks}" if config.masks else ""),
        metrics=metrics,
        widths=[AxisWidth(axis.name, axis.width, len(axis.keep)) for axis in plan.axes],
        pins=bench.coupling.pins,
        config=dump_config(config),
    )
    write_text(folder / REPORT, page)


def _verdict(bench: Bench, dense: Snapshot, reached: Snapshot, before: Json, after: Json) -> tuple[bool, str]:
    """Whether target and floor (on test) hold, and one sentence that says so, or what does not and how close it came."""
    config, parts, met = bench.config, [], True
    for key, budget in config.target.resolve(bench.cost).items():
        whole = float(getattr(bench.cost, key))
        holds = reached.cost[key] <= budget * (1 + OVER if key == "latency" else 1)
        label = {"macs": "MACs", "params": "parameters", "latency": f"latency ({config.target.setting})"}.get(key, key)
        shares = f"{label} {humanise(whole, key)} → {humanise(reached.cost[key], key)} (× {reached.cost[key] / whole:.3f})"
        parts.append(f"{shares}, {'within' if holds else 'over'} the target of {humanise(budget, key)}")
        met &= holds
    if reached.masks:
        parts.append(zeros_said(reached.masks))
    drop, limit = before["top1"] - after["top1"], config.max_drop if config.max_drop is not None else math.inf
    moved = f"test top-1 {'down' if drop >= 0 else 'up'} {abs(drop):.2f} points"
    holds = drop <= limit + SLACK
    parts.append(moved if limit == math.inf else f"{moved}, {'within' if holds else 'over'} the limit of {limit:g}")
    lost = dense.top1 - reached.top1
    parts.append(f"validation top-1 {'down' if lost >= 0 else 'up'} {abs(lost):.2f} points")
    if has_seen_validation(dense.val, before):
        parts[-1] += " (the dense model was trained on those images, which overstates it)"
    if not holds:
        parts[-1] += ": the floor on accuracy does not hold at this size; try more epochs, more steps, or a milder target"
    return met and holds, "; ".join(parts) + "."
