"""Seconds from a model to its pruned copy, beside Torch-Pruning 1.6.1 on every model that both manage: `python bench/speed.py`.

Ours: capture, couple, score by L1, plan for half of the MACs, apply. Theirs: dependency graph, L1 importance, one step of their pruner at a
ratio of 0.3 with the classifier ignored, on a copy made outside the clock; no heads are given, as ours gets none. Both on multiples of 8.
The two take turns in one process a model (its own, so that a crash is one row); the ratio is of the fastest of each. A model counts as
managed if the pruned copy runs. The second table shows one family at four depths. `pip install coppice[bench]` first.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coverage import HERE, build_model, example_inputs

REPEATS = 3
LIMIT = 180.0  # seconds a model
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
    start = time.perf_counter()
    pruned = prune(mine, inputs)
    return time.perf_counter() - start, pruned


def compare(model: Any, inputs: tuple[Any, ...]) -> Row:
    """Fastest seconds of each; an error stands where one fails."""
    row: Row = {"parameters": sum(p.numel() for p in model.parameters())}
    alive: dict[str, Callable[..., Any]] = {"ours": ours, "theirs": theirs}
    seconds: dict[str, list[float]] = {name: [] for name in alive}
    for _ in range(REPEATS):
        for name, prune in list(alive.items()):
            try:
                spent, pruned = timed(prune, model, inputs)
                runs(pruned, inputs)
                seconds[name].append(spent)
            except Exception as error:  # any of the two may raise anything: that is what is counted
                row[f"{name}_error"] = f"{type(error).__name__}: {error}"[:200]
                del alive[name]
    row.update({name: min(spent) for name, spent in seconds.items() if name in alive})
    if len(alive) == 2:
        row["ratio"] = row["theirs"] / row["ours"]
    return row


def in_a_process(make: Callable[[], tuple[Any, tuple[Any, ...]]], limit: float) -> Row:
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def work() -> None:
        warnings.simplefilter("ignore")
        send.send(compare(*make()))

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
    lines = ["| model | ours s | theirs s | theirs / ours |", "|---|---:|---:|---:|"]
    lines += [f"| {r['name']} | {r['ours']:.2f} | {r['theirs']:.2f} | {r['ratio']:.2f} |" for r in both]
    ratios = [r["ratio"] for r in both]
    mine = sum("ours" in r for r in rows)
    lines += ["", f"{len(rows)} models: ours manages {mine}, theirs {sum('theirs' in r for r in rows)}, both {len(both)}."]
    if ratios:
        lines.append(f"theirs / ours: median {statistics.median(ratios):.2f}, least {min(ratios):.2f}, most {max(ratios):.2f}.")
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
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    import torch
    import torch_pruning

    torch.set_num_threads(1)
    models = [line.strip() for line in args.list.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")]
    models = [m for m in models if not args.only or any(part in m for part in args.only)]
    rows: list[Row] = []
    for line in models:
        rows.append({"name": line.rsplit(":", 1)[0], **in_a_process(lambda line=line: zoo_model(line), LIMIT)})  # type: ignore[misc]
        print(json.dumps(rows[-1]), flush=True)
    depths = [] if args.only else [{"depth": d, **in_a_process(lambda d=d: deep_model(d), LIMIT)} for d in DEPTHS]  # type: ignore[misc]
    text = table(rows) + ("\n\n" + depth_table(depths) if depths else "")
    print(text)
    if args.out:
        versions = {"torch": torch.__version__, "torch_pruning": getattr(torch_pruning, "__version__", "1.6.1"), "python": sys.version}
        args.out.write_text(json.dumps({"rows": rows, "depths": depths, "versions": versions}, indent=1) + "\n", encoding="utf-8")
    if args.table:
        args.table.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
