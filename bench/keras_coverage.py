"""Every family of keras.applications, its smallest model, cut to half of its MACs without a hint, verified, trained a step, saved, loaded.

    KERAS_BACKEND=tensorflow python bench/keras_coverage.py            # all families, on that backend
    KERAS_BACKEND=jax python bench/keras_coverage.py MobileNetV2 VGG16  # some
    python bench/keras_coverage.py --table                             # bench/results/keras_coverage.md from what was run

What was run before on a backend is not run again. Weights are random (weights=None): what is checked does not depend on them.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "keras_coverage.jsonl"
FAMILIES = {  # the smallest model of each, and pixels a side
    "VGG16": 48, "MobileNet": 64, "MobileNetV2": 64, "MobileNetV3Small": 64, "ResNet50": 64, "ResNet50V2": 64, "EfficientNetB0": 64,
    "EfficientNetV2B0": 64, "DenseNet121": 64, "Xception": 72, "InceptionV3": 80, "InceptionResNetV2": 80, "NASNetMobile": 64,
    "ConvNeXtTiny": 64,
}  # fmt: skip


def checked(name: str, side: int) -> dict[str, Any]:
    """One model through all the stages; raises where one of them fails."""
    import keras
    import numpy as np

    import coppice
    from coppice.keras.apply import weights_in

    keras.utils.set_random_seed(0)
    model = made(name, side)
    start = time.process_time()
    coupling = coppice.couple(coppice.capture(model, (1, side, side, 3)))
    plan = coppice.plan(coupling, coppice.score(model, coupling, "l1"), {"macs": 0.5 * coupling.cost().macs})
    pruned = coppice.apply(model, plan)
    planned = time.process_time() - start
    proof = coppice.verify(model, pruned, coupling, plan)
    cost = coppice.couple(coppice.capture(pruned, (1, side, side, 3))).cost()
    x, y = np.random.default_rng(0).standard_normal((4, side, side, 3)).astype("float32"), np.arange(4)
    pruned.compile("sgd", "sparse_categorical_crossentropy", jit_compile=keras.backend.backend() == "jax")
    loss = float(pruned.train_on_batch(x, y))
    with tempfile.TemporaryDirectory() as folder:
        pruned.save(Path(folder) / "m.keras")
        again = keras.saving.load_model(Path(folder) / "m.keras")
        same = all(a.tobytes() == b.tobytes() for a, b in zip(weights_in(pruned).values(), weights_in(again).values(), strict=True))
        same = same and np.array_equal(pruned.predict_on_batch(x), again.predict_on_batch(x))
    precision = proof.checked[-1].split(" in ")[1].split(" ")[0]
    pins = {reason: len(names) for reason, names in coupling.pins.items()}
    return {
        "axes": len(coupling.prunable), "macs": coupling.cost().macs, "part": cost.macs / coupling.cost().macs,
        "params": cost.params / coupling.cost().params, "error": proof.max_error, "precision": precision,
        "step": bool(np.isfinite(loss)), "same": bool(same), "pins": pins, "planned": planned,
    }  # fmt: skip


def made(name: str, side: int) -> Any:
    import keras

    options = {"weights": None, "input_shape": (side, side, 3), "classes": 10}
    if name == "NASNetMobile" and keras.backend.backend() == "torch":  # Keras withholds it there, but not what it is made by
        from keras.src.applications.nasnet import NASNet

        return NASNet(
            penultimate_filters=1056, num_blocks=4, stem_block_filters=32, skip_reduction=False, filter_multiplier=2,
            default_size=224, **options,
        )  # fmt: skip
    return getattr(keras.applications, name)(**options)


def known() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table() -> str:
    lines = [
        "# Keras: every family of keras.applications at half of its MACs", "",
        "`bench/keras_coverage.py`: the smallest model of each family, random weights, no hints, global L1 on a grid of 8. Error: sliced",
        "against the oracle, op by op, the larger of its own and random weights. Seconds: CPU, from the model to the pruned model, without",
        "verification. The training step on JAX is compiled. Keras itself withholds NASNetMobile on PyTorch, for an open bug of its own;",
        "there it is made by the function that makes it elsewhere.",
        "", "| model | backend | axes | MACs | parameters | error | precision | training step | saved = loaded | seconds | pinned |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in known():
        if "failed" in row:
            lines.append(f"| {row['model']} | {row['backend']} | failed: {row['failed']} |" + " |" * 8)
            continue
        pins = "; ".join(f"{reason} ({n})" for reason, n in row["pins"].items())
        lines.append(
            f"| {row['model']} ({row['side']} px) | {row['backend']} | {row['axes']} | × {row['part']:.3f} | × {row['params']:.3f} | "
            f"{row['error']:.1e} | {row['precision']} | {'yes' if row['step'] else 'no'} | {'yes' if row['same'] else 'no'} | "
            f"{row['planned']:.1f} | {pins} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    if "--table" not in arguments:
        import keras

        backend, keras_version = keras.backend.backend(), keras.__version__
        done = {(row["model"], row["backend"]) for row in known()}
        for name, side in FAMILIES.items():
            if (arguments and name not in arguments) or (name, backend) in done:
                continue
            row = {"model": name, "side": side, "backend": backend, "keras": keras_version}
            try:
                row |= checked(name, side)
            except Exception as error:  # one model must not end the run; the row says what it was
                row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            with RESULTS.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            print(name, row.get("failed") or f"{row['part']:.3f} {row['error']:.1e}", flush=True)
            keras.backend.clear_session()
    RESULTS.with_suffix(".md").write_text(table())


if __name__ == "__main__":
    main(sys.argv[1:])
