"""The last stage: check that what will be saved is what was measured, then write the outputs and seal them.

Nothing is put in its place unless everything held. The files are made from the journal and the stored weights: being killed here costs only
this step.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence

import torch
from torch import nn

from coppice.config import dump_config
from coppice.coupling import couple
from coppice.data import ImageData, sample_batches
from coppice.errors import CoppiceError, VerificationError
from coppice.evaluate import evaluate
from coppice.exporting import RTOL, ExportError, export_onnx
from coppice.forward import logits
from coppice.latency import latency_model
from coppice.masking import check_zeros
from coppice.planning import Plan, kept_widths
from coppice.quantise import OnnxModel, quantise
from coppice.report import AxisWidth, render_report
from coppice.run import CONFIG, INT8, METRICS, MODEL, ONNX, PLAN, REPORT, SPARSE, Json, read_tensors, write_tensors, write_text
from coppice.snapshot import Snapshot
from coppice.sparse_file import save_checked
from coppice.stages import REPAIRED_AT_ONCE, Workbench, example_input, materialise, preprocessing, same_bits, test_metrics
from coppice.torch.apply import apply, build
from coppice.torch.capture import capture
from coppice.torch.trees import named_tensors
from coppice.torch.verify import verify

_IMAGES = 8  # real images on which the saved file and the exported one are compared


def finish(bench: Workbench, history: Sequence[Snapshot], reached: Snapshot, met: bool, statement: str) -> None:
    """Measure on the test split, verify, write every output, and the manifest last."""
    assert reached.plan is not None, "a run always ends with a cut"
    plan = Plan.from_json(reached.plan)
    model = materialise(bench, reached)
    dense_test, pruned_test = test_metrics(bench, history[0]), test_metrics(bench, reached)
    began = time.perf_counter()
    checks = [*reached.checks, *(_check_whole_plan(bench, plan) if bench.run.config.steps > 1 else []), _check_saved(bench, plan, model)]
    masks, held = _masked(bench, plan, model, reached)
    onnx, notes = _export(bench, model)
    int8 = _quantised(bench, notes)
    metrics: Json = {
        "dense": {**dense_test, **history[0].cost, "val": dict(history[0].val)},
        "pruned": {**pruned_test, **reached.cost, "val": dict(reached.val)},
        "target": {**bench.run.config.target.to_dict(), "max_drop": bench.run.config.max_drop},
        "latency": _latency(bench, plan, reached),
        "regularised": reached.regularised,
        "masks": masks,
        "int8": int8,
        "drop": {"val": history[0].top1 - reached.top1, "test": dense_test["top1"] - pruned_test["top1"]},
        "met": met,
        "verified": True,  # what fails a check raises, and nothing is saved
        "statement": statement,
        "verification": {"checks": checks + held + onnx, "max_error": reached.max_error},
        "history": [_step(bench, snapshot) for snapshot in history],
        "modules": plan.modules,
        "classes": _classes(bench, len(dense_test["per_class"])),
        "input": [1, *example_input(bench.data).shape[1:]],
        "notes": notes,
        "seconds": round(sum(bench.run.seconds().values()) + time.perf_counter() - began, 1),
    }
    _write(bench, plan, metrics)
    bench.run.finish()


def _latency(bench: Workbench, plan: Plan, reached: Snapshot) -> Json | None:
    """What was promised and measured, and what each layer takes before and after by the table; None where no target asks for it."""
    if bench.clock is None or reached.latency is None or bench.cost.latency is None:
        return None
    found = latency_model(bench.coupling, bench.clock.setting, bench.cost.latency, bench.run.config.min_width)
    before = found.layers()
    after = _layers_without(bench, reached) if plan.modules else found.layers(kept_widths(bench.coupling, plan))
    layers = [(name, seconds, after.get(name, 0.0)) for name, seconds in before.items()]
    said = {"dense": bench.cost.latency, "unexplained": found.unexplained, "grid": found.grid, "layers": layers}
    return {**reached.latency, **said}


def _masked(bench: Workbench, plan: Plan, model: nn.Module, reached: Snapshot) -> tuple[Json | None, list[str]]:
    """What the zeros come to, and what was checked of them; the small file is written here. None where nothing is masked."""
    if not plan.weight_masks or reached.masks is None:
        return None, []
    named = named_tensors(model)
    zeros = {name: (named[name] == 0).cpu().numpy() for name in plan.weight_masks}
    checks = [check_zeros(plan, zeros), save_checked(bench.run.path / SPARSE, model.state_dict())]
    sizes = {"file_bytes": (bench.run.path / SPARSE).stat().st_size, "dense_file_bytes": (bench.run.path / MODEL).stat().st_size}
    return {**reached.masks, **sizes}, checks


def _layers_without(bench: Workbench, reached: Snapshot) -> dict[str, float]:
    """What each layer takes where modules are gone: that model has other ops, so a latency model of its own."""
    assert bench.clock is not None
    here = couple(capture(materialise(bench, reached), (example_input(bench.data),)))
    return latency_model(here, bench.clock.setting, reached.cost["latency"], bench.run.config.min_width).layers()


def _check_whole_plan(bench: Workbench, plan: Plan) -> list[str]:
    """Several cuts were verified one by one; their sum is verified once more against the dense model."""
    with bench.progress.bar("verifying the whole plan against the dense model"):
        found = verify(bench.dense, apply(bench.dense, plan), bench.coupling, plan)
    return [f"all cuts as one: {line}" for line in found.checked]


def _check_saved(bench: Workbench, plan: Plan, model: nn.Module) -> str:
    """Save, load into a fresh model, and compare: weights bit by bit, and the outputs on real images."""
    path = bench.run.path / MODEL
    candidate = bench.run.state_path("final")
    write_tensors(candidate, model.state_dict())
    again = build(copy.deepcopy(bench.dense), plan, read_tensors(candidate)).eval()
    images = example_input(bench.data, _IMAGES)
    with torch.no_grad():
        same = same_bits(model.state_dict(), again.state_dict()) and same_bits({"": logits(model(images))}, {"": logits(again(images))})
    if not same:
        raise VerificationError(f"{path.name} loaded again is not the model that was saved: a module keeps state outside its state dict")
    candidate.replace(path)
    return f"saved and loaded again: the same bits, weights and outputs on {len(images)} images"


def _export(bench: Workbench, model: nn.Module) -> tuple[list[str], list[str]]:
    """The check's line and the notes; a model that the exporter can't write is a note, a wrong file is an error."""
    path = bench.run.path / ONNX
    images = _some_images(bench)
    with bench.progress.bar("exporting to ONNX and comparing"):
        try:
            check = export_onnx(model, images, path)
        except ExportError as error:
            path.unlink(missing_ok=True)
            return [], [f"There is no {ONNX}: {error}."]
    within = f"within {check.error:.1e} of the largest output (allowed {RTOL:g})"
    return [f"ONNX Runtime equals PyTorch {within}, {check.images} images in batches of {', '.join(map(str, check.batches))}"], []


def _quantised(bench: Workbench, notes: list[str]) -> Json | None:
    """The exported model in INT8, and how it does on the test split; None where it is not asked for, or nothing could be exported."""
    onnx, out, config = bench.run.path / ONNX, bench.run.path / INT8, bench.run.config
    if not config.int8 or not onnx.exists():
        return None
    with bench.progress.bar("quantising to INT8"):
        batches = sample_batches(
            bench.data.train, preprocessing(bench.data), images=config.calibration, seed=config.seed, batch_size=REPAIRED_AT_ONCE
        )
        try:
            quantise(onnx, out, (x for x, _ in batches))
        except CoppiceError as error:
            notes.append(f"There is no {INT8}: {error}.")
            return None
    with bench.progress.bar("measuring INT8 on the test split") as advance:
        found = evaluate(OnnxModel(out), bench.data.test, preprocessing(bench.data), progress=advance)
    plain = {"top1": found.top1, "top5": found.top5, "n": found.n, "top1_ci95": list(found.top1_ci95)}
    return {**plain, "bytes": out.stat().st_size, "onnx_bytes": onnx.stat().st_size}


def _some_images(bench: Workbench) -> torch.Tensor:
    """At least four images: real ones, repeated if there are fewer."""
    images = example_input(bench.data, _IMAGES)
    return images if len(images) >= 4 else images.repeat(4, 1, 1, 1)


def _step(bench: Workbench, snapshot: Snapshot) -> Json:
    return {
        "stage": snapshot.stage,
        **snapshot.cost,
        "epochs": snapshot.epochs,
        "val_top1": snapshot.top1,
        "seconds": bench.run.seconds().get(snapshot.stage, 0.0),
        "repair": None if snapshot.epochs else snapshot.recovery,
        "training": [dict(result) for result in snapshot.training],
        "optimizer": snapshot.optimizer,
        "taken": snapshot.taken,
    }


def _classes(bench: Workbench, count: int) -> list[str]:
    return list(bench.data.classes) if isinstance(bench.data, ImageData) else [str(k) for k in range(count)]


def _write(bench: Workbench, plan: Plan, metrics: Json) -> None:
    folder, config = bench.run.path, bench.run.config
    write_text(folder / PLAN, plan.to_json() + "\n")
    write_text(folder / METRICS, json.dumps(metrics, indent=1) + "\n")
    name = config.model.rpartition(":")[2] or type(bench.dense).__name__
    page = render_report(
        title=f"{name}, {metrics['pruned']['macs'] / metrics['dense']['macs']:.3f} of the MACs"
        + (f", {config.masks}" if config.masks else ""),
        metrics=metrics,
        widths=[AxisWidth(axis.name, axis.width, len(axis.keep)) for cut in plan.cuts for axis in cut.axes],
        pins=bench.coupling.pins,
        config=(folder / CONFIG).read_text(encoding="utf-8") if (folder / CONFIG).exists() else dump_config(config),
    )
    write_text(folder / REPORT, page)
