"""Every family of keras.applications, cut to half of its MACs, written as SavedModel, LiteRT and ONNX, and compared with Keras.

    KERAS_BACKEND=tensorflow python bench/keras_exports.py              # all families and formats, on that backend
    KERAS_BACKEND=torch python bench/keras_exports.py MobileNetV2        # some
    python bench/keras_exports.py --table                                # bench/results/keras_exports.md from what was run

What was run before on a backend is not run again. Weights are random, and so are the inputs; the outputs are logits, whose size no softmax
hides.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keras_coverage import FAMILIES, made

RESULTS = Path(__file__).parent / "results" / "keras_exports.jsonl"


def drawn(weight: Any) -> Any:
    """Random numbers with which a deep network's signal neither vanishes nor explodes, where nothing shrinks it."""
    import numpy as np

    shape = tuple(weight.shape)
    noise = np.random.default_rng(len(shape) + sum(shape)).random(shape)
    if weight.name in ("gamma", "variance", "moving_variance"):
        return 0.5 + noise
    if len(shape) < 2:
        return noise - 0.5
    fan_in = noise.size / next(n for n in shape[::-1] if n > 1)  # of a depthwise kernel: pixels
    return (noise - 0.5) * (24 / fan_in) ** 0.5


def patches(count: int, side: int) -> Any:
    """Images of large patches of random colours: of noise, a pooled network's means are all but alike."""
    import numpy as np

    colours = np.random.default_rng(1).uniform(-1, 1, (count, 4, 4, 3))
    return np.kron(colours, np.ones((1, -(-side // 4), -(-side // 4), 1)))[:, :side, :side].astype("float32")


def exported(name: str, side: int, formats: list[str]) -> Iterator[dict[str, Any]]:
    """One row a format."""
    import keras
    import numpy as np

    import coppice
    from coppice.keras.apply import rebuilt
    from coppice.keras.export import FORMATS
    from coppice.keras.heads import without_softmax

    keras.utils.set_random_seed(0)
    model = made(name, side)
    logits = rebuilt(model, without_softmax(model))
    logits.set_weights([drawn(weight) for weight in logits.weights])
    coupling = coppice.couple(coppice.capture(logits, (1, side, side, 3)))
    pruned = coppice.apply(logits, coppice.plan(coupling, coppice.score(logits, coupling, "l1"), {"macs": 0.5 * coupling.cost().macs}))
    images = patches(5, side)
    outputs = pruned.predict_on_batch(images)
    spread = float(np.ptp(outputs, axis=0).max() / np.abs(outputs).max())
    for to in formats:
        row: dict[str, Any] = {"format": to}
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"m{FORMATS[to].suffix}"
            try:
                row["error"] = coppice.export(pruned, path, to, images).error
                row["bytes"] = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")))
            except coppice.CoppiceError as error:  # what it can't write is one of the answers
                row["failed"] = str(error).split(", scope:")[0][:300]  # after that PyTorch names places on this machine
        yield row | {"spread": spread, "seconds": time.process_time() - start}


def known() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table() -> str:
    lines = [
        "# Keras: every family of keras.applications at half of its MACs, exported", "",
        "`bench/keras_exports.py`: random weights, logits; the largest difference from Keras, relative",
        "to the largest output, on five inputs as one batch, as three, and one by one (allowed: 1e-4). Spread: how far the",
        "outputs of the five inputs are apart, by the same measure: where it is as small as the error, it only says that a file runs.",
        "Seconds: CPU.", "",
        "| model | backend | format | error | spread | MB | seconds |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in known():
        found = (
            f"failed: {row['failed']} | | |"
            if "failed" in row
            else f"{row['error']:.1e} | {row['spread']:.2g} | {row['bytes'] / 1e6:.2f} |"
        )
        lines.append(f"| {row['model']} ({row['side']} px) | {row['backend']} | {row['format']} | {found} {row['seconds']:.1f} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    if "--table" not in arguments:
        import keras

        from coppice.keras.export import FORMATS

        backend = keras.backend.backend()
        done = {(row["model"], row["backend"], row["format"]) for row in known()}
        for name, side in FAMILIES.items():
            formats = [to for to in ("savedmodel", "lite", "onnx") if backend in FORMATS[to].needs and (name, backend, to) not in done]
            if (arguments and name not in arguments) or not formats:
                continue
            for row in exported(name, side, formats):
                with RESULTS.open("a") as stream:
                    stream.write(json.dumps({"model": name, "side": side, "backend": backend, "keras": keras.__version__, **row}) + "\n")
                print(name, row, flush=True)
            keras.backend.clear_session()
    RESULTS.with_suffix(".md").write_text(table())


if __name__ == "__main__":
    main(sys.argv[1:])
