"""CPU seconds from a model to its pruned copy, beside Torch-Pruning 1.6.1 on every model that both manage: `python bench/speed.py`.

Ours: capture, couple, score by L1, plan for half of the MACs, apply. Theirs: dependency graph, L1 importance, one step of their pruner at a
ratio of 0.3 with the classifier ignored, on a copy made outside the clock; no heads are given, as ours gets none. Both on multiples of 8.
The two take turns in one process a model (its own, so that a crash is one row), on one thread. A model counts as managed if the pruned copy
runs. The ratio is of the fastest of three runs of each; `first` is of the first run of each, in which PyTorch meets most shapes for the
first time. Memory: by how much the resident set grows at most, from before the model is built to the pruned copy, over by how much it grows
for the model and one forward pass of it. All that after each tool has pruned a small network once, so that libraries are loaded.
The second table shows one family at four depths. Rows that are in `--out` already are kept. `pip install coppice[bench]` first.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import multiprocessing
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coverage import HERE, build_model, example_inputs

REPEATS = 3
MEMORY = 16 * 2**30  # bytes of address space that a model may take: one of the two may ask for all there is
DEPTHS = (50, 251, 500, 1001)
Row = dict[str, Any]


def ours(model: Any, inputs: tuple[Any, ...]) -> Any:
    import coppice

    coupling = coppice.couple(coppice.capture(model, inputs))
    budget = {"macs": 0.5 * coupling.cost().macs}
    return coppice.apply(model, coppice.plan(coupling, coppice.score(model, coupling, "l1"), budget))


def theirs(model: Any, inputs: tuple[Any, ...]) -> Any:
    """Their documented use; the last linear layer is what their users are told to ignore."""
    import torch_pruning as tp
    from torch import nn

    linears = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    pruner = tp.pruner.BasePruner(
        model, inputs[0], importance=tp.importance.MagnitudeImportance(p=1), pruning_ratio=0.3, ignored_layers=linears[-1:], round_to=8
    )
    pruner.step()
    return model


def runs(model: Any, inputs: tuple[Any, ...]) -> bool:
    import torch

    with torch.no_grad():
        model.eval()(*inputs)
    return True


def timed(prune: Callable[[Any, tuple[Any, ...]], Any], model: Any, inputs: tuple[Any, ...]) -> tuple[float, Any]:
    mine = copy.deepcopy(model)
    gc.collect()  # neither pays for what the other left
    start = time.process_time()
    pruned = prune(mine, inputs)
    return time.process_time() - start, pruned


def memory(what: str) -> int:
    """Kilobytes of this process: `VmRSS` now, `VmHWM` at most since :func:`forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def warm_up() -> None:
    """Both on a small network."""
    model, inputs = deep_model(50)
    for prune in (ours, theirs):
        prune(copy.deepcopy(model), inputs)


def compare(make: Callable[[], tuple[Any, tuple[Any, ...]]]) -> Row:
    """Seconds of each, the fastest and the first; an error stands where one fails, and then there is nothing to repeat."""
    warm_up()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, else the model would be built in it
    base = memory("VmRSS")
    forget_peak()
    model, inputs = make()
    runs(model, inputs)
    own = memory("VmHWM") - base
    row: Row = {"parameters": sum(p.numel() for p in model.parameters()), "own_kb": own}
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in range(REPEATS):
        for name, prune in (("ours", ours), ("theirs", theirs)):
            if turn and len(row.keys() & {"ours_error", "theirs_error"}):
                break
            try:
                forget_peak()
                spent, pruned = timed(prune, model, inputs)
                if turn == 0:
                    row[f"{name}_peak_kb"] = memory("VmHWM") - base - copied_kb(model)
                runs(pruned, inputs)
                seconds[name].append(spent)
            except Exception as error:  # any of the two may raise anything: that is what is counted
                row[f"{name}_error"] = f"{type(error).__name__}: {error}"[:200]
            pruned = None
    for name, spent_each in seconds.items():
        if f"{name}_error" not in row:
            row |= {name: min(spent_each), f"{name}_first": spent_each[0]}
    if "ours" in row and "theirs" in row:
        row |= {"ratio": row["theirs"] / row["ours"], "first_ratio": row["theirs_first"] / row["ours_first"]}
    return row


def copied_kb(model: Any) -> int:
    """The copy that each works on, which a user does not make."""
    return int(sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) / 1024)


def in_a_process(make: Callable[[], tuple[Any, tuple[Any, ...]]], limit: float) -> Row:
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def work() -> None:
        warnings.simplefilter("ignore")
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        send.send(compare(make))

    process = context.Process(target=work)
    process.start()
    send.close()
    row: Row = {"error": f"more than {limit:.0f} s"}
    if receive.poll(limit):
        try:
            row = receive.recv()
        except EOFError:
            row = {"error": "the process died"}
    process.kill()
    process.join()
    return row


def zoo_model(line: str) -> tuple[Any, tuple[Any, ...]]:
    lib, name, size = line.split(":")
    height, width = (int(s) for s in size.split("x"))
    return build_model(lib, name), example_inputs(lib, name, (height, width), 1)


def deep_model(depth: int) -> tuple[Any, tuple[Any, ...]]:
    """A bottleneck ResNet of ``depth`` layers with narrow channels, so that the structure is what takes time."""
    import torch
    from torchvision.models.resnet import Bottleneck, ResNet

    blocks = (depth - 2) // 3
    return ResNet(Bottleneck, [3, 4, blocks - 10, 3], width_per_group=16).eval(), (torch.randn(1, 3, 64, 64),)


def table(rows: list[Row]) -> str:
    both = sorted((r for r in rows if "ratio" in r), key=lambda r: r["ratio"])
    lines = ["| model | ours s | theirs s | theirs / ours | first runs | memory: ours | theirs |", "|---|---:|---:|---:|---:|---:|---:|"]
    for r in both:
        peaks = " | ".join(f"{r[f'{name}_peak_kb'] / r['own_kb']:.2f}" for name in ("ours", "theirs"))
        lines.append(f"| {r['name']} | {r['ours']:.2f} | {r['theirs']:.2f} | {r['ratio']:.2f} | {r['first_ratio']:.2f} | {peaks} |")
    mine = [r for r in rows if "ours" in r]
    lines += ["", f"{len(rows)} models: ours manages {len(mine)}, theirs {sum('theirs' in r for r in rows)}, both {len(both)}."]
    for key, what in (("ratio", "fastest runs"), ("first_ratio", "first runs")) if both else ():
        ratios = [r[key] for r in both]
        lines.append(
            f"theirs / ours, {what}: median {statistics.median(ratios):.2f}, least {min(ratios):.2f}, most {max(ratios):.2f}, "
            f"{sum(x < 1 / 1.2 for x in ratios)} models where ours takes more than 1.2 times as long."
        )
    if mine:
        peaks_of_mine = [r["ours_peak_kb"] / r["own_kb"] for r in mine]
        lines.append(
            f"Memory of ours over the model's own: median {statistics.median(peaks_of_mine):.2f}, most {max(peaks_of_mine):.2f}; "
            f"more than 2.5 on {sum(x > 2.5 for x in peaks_of_mine)} of {len(mine)} models."
        )
    return "\n".join(lines)


def depth_table(rows: list[Row]) -> str:
    def cell(row: Row, name: str) -> str:
        return f"{row[name]:.2f} | {1000 * row[name] / row['depth']:.1f}" if name in row else f"{row.get('error', 'fails')} | "

    lines = ["| layers | ours s | ms a layer | theirs s | ms a layer |", "|---:|---:|---:|---:|---:|"]
    return "\n".join(lines + [f"| {r['depth']} | {cell(r, 'ours')} | {cell(r, 'theirs')} |" for r in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", type=Path, default=HERE / "zoo.txt")
    parser.add_argument("--only", action="append", help="a part of the name")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds a model, by the clock on the wall [90]")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    import torch
    import torch_pruning

    torch.set_num_threads(1)
    models = [line.strip() for line in args.list.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")]
    models = [m for m in models if not args.only or any(part in m for part in args.only)]
    known = json.loads(args.out.read_text(encoding="utf-8")) if args.out and args.out.exists() else {"rows": [], "depths": []}
    rows, depths = {r["name"]: r for r in known["rows"]}, {r["depth"]: r for r in known["depths"]}

    def save() -> None:
        if args.out:
            versions = {"torch": torch.__version__, "torch_pruning": getattr(torch_pruning, "__version__", "1.6.1"), "python": sys.version}
            found = {"rows": list(rows.values()), "depths": list(depths.values()), "versions": versions}
            args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    for line in models:
        name = line.rsplit(":", 1)[0]
        if name not in rows:
            rows[name] = {"name": name, **in_a_process(lambda line=line: zoo_model(line), args.limit)}  # type: ignore[misc]
            print(json.dumps(rows[name]), flush=True)
            save()
    for depth in DEPTHS if not args.only else ():
        if depth not in depths:
            depths[depth] = {"depth": depth, **in_a_process(lambda depth=depth: deep_model(depth), args.limit)}  # type: ignore[misc]
            save()
    text = table(list(rows.values())) + ("\n\n" + depth_table(list(depths.values())) if depths else "")
    print(text)
    if args.table:
        args.table.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
