"""Prunes generated networks by random plans, offline and in numbers: `python bench/fuzz.py --count 5000 --jobs 2 --out FILE.json`.

With `--rows FILE.jsonl` every seed is written down when it is done, and those that are there are not run again: it can be run in pieces.
Every fifth network has no op that mixes the channels and is compared with the dense model as well (removed weights at zero).
A failing seed is repeated by `--start SEED --count 1`. Exits with status 1 if any seed fails.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import coppice
from coppice.errors import VerificationError
from coppice.testing import Checked, MismatchError, check_pruning


@dataclass(frozen=True)
class Row:
    """One seed: what was checked, or how it failed."""

    seed: int
    seconds: float
    checked: Checked | None
    mismatch: str | None = None
    crash: str | None = None


def run_seed(seed: int) -> Row:
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        checked = check_pruning(seed, mixing=seed % 5 != 0)
    except (MismatchError, VerificationError) as error:
        return Row(seed, time.perf_counter() - start, None, mismatch=f"{type(error).__name__}: {error}")
    except Exception as error:  # anything at all that goes wrong is a finding
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        return Row(seed, time.perf_counter() - start, None, crash=text)
    return Row(seed, time.perf_counter() - start, checked)


def summarise(rows: list[Row]) -> dict[str, object]:
    """Everything the table shows and the JSON holds."""
    checked = [row.checked for row in rows if row.checked is not None]
    shares = sorted(c.prunable_share for c in checked)
    axes = sum(c.axes for c in checked)
    return {
        "seeds": len(rows),
        "first": min(row.seed for row in rows),
        "last": max(row.seed for row in rows),
        "mismatches": {row.seed: row.mismatch for row in rows if row.mismatch is not None},
        "crashes": {row.seed: row.crash for row in rows if row.crash is not None},
        "zeroed": sum(c.zeroed for c in checked),
        "axes": axes,
        "axes_prunable": sum(c.prunable for c in checked),
        "axes_cut": sum(c.cut for c in checked),
        "prunable_share_mean": sum(shares) / len(shares) if shares else 0.0,
        "prunable_share_median": shares[len(shares) // 2] if shares else 0.0,
        "seconds": sum(row.seconds for row in rows),
        "pins": dict(sum((Counter(c.pins) for c in checked), Counter()).most_common()),
        "blocks": dict(Counter(name for c in checked for name in c.blocks).most_common()),
        "ops": dict(Counter(name for c in checked for name in c.ops).most_common()),
        "versions": {"coppice": coppice.__version__, "torch": str(torch.__version__), "python": sys.version.split()[0]},
    }


def table(summary: dict[str, object]) -> str:
    """The summary as Markdown: totals, failures with their seeds, coverage."""
    totals = ("seeds", "zeroed", "axes", "axes_prunable", "axes_cut", "prunable_share_mean", "prunable_share_median", "seconds")
    lines = ["| what | value |", "|---|---|"]
    for name in ("mismatches", "crashes"):
        failed = summary[name]
        assert isinstance(failed, dict)
        lines.append(f"| {name} | {len(failed)} |")
    lines += [f"| {name} | {value:.3f} |" if isinstance(value := summary[name], float) else f"| {name} | {value} |" for name in totals]
    for name in ("mismatches", "crashes"):
        failed = summary[name]
        assert isinstance(failed, dict)
        lines += [f"\n{name}:"] * bool(failed) + [f"  {seed}: {str(text)[:300]}" for seed, text in failed.items()]
    for name in ("pins", "blocks", "ops"):
        counts = summary[name]
        assert isinstance(counts, dict)
        lines += [f"\n| {name} | calls |", "|---|---|", *(f"| {key} | {count} |" for key, count in counts.items())]
    return "\n".join(lines)


def read_rows(path: Path | None) -> list[Row]:
    lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    return [replace(row, checked=Checked(**row.checked)) if isinstance(row.checked, dict) else row for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=Path, help="a JSONL file, one row a seed; the answer is of all that are in it")
    args = parser.parse_args()
    rows = read_rows(args.rows)
    done = {row.seed for row in rows}
    todo = [seed for seed in range(args.start, args.start + args.count) if seed not in done]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool, open(args.rows or os.devnull, "a", encoding="utf-8") as file:
        for row in pool.imap_unordered(run_seed, todo, chunksize=8):
            rows.append(row)
            print(json.dumps(asdict(row)), file=file, flush=True)
            if len(rows) % 250 == 0:
                failed = sum(r.checked is None for r in rows)
                print(f"{len(rows)}/{len(done) + len(todo)} seeds, {failed} failed", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: row.seed)
    summary = summarise(rows)
    print(table(summary))
    if args.out is not None:
        per_seed = [{k: v for k, v in asdict(row).items() if k != "checked"} | {"ok": row.checked is not None} for row in rows]
        args.out.write_text(json.dumps(summary | {"rows": per_seed}, indent=1) + "\n")
    return int(any(row.checked is None for row in rows))


if __name__ == "__main__":
    sys.exit(main())
