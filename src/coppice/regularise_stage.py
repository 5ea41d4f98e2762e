"""The stage that trains the dense model with a regulariser, before anything is cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

from coppice.errors import CoppiceError
from coppice.planning import make_plan
from coppice.run import Json
from coppice.snapshot import Snapshot, as_snapshot
from coppice.stages import Workbench, validate
from coppice.torch.regularise import regulariser
from coppice.tune_stage import how_trained, steps_of, to_train, trained


def regularised(bench: Workbench, name: str, before: Snapshot, epochs: int, budgets: Mapping[str, float]) -> Snapshot:
    """The dense model after `epochs` with the run's regularisation; nothing is removed yet: what is near zero is for the cut to find."""
    config = bench.run.config
    if bench.train is not None:
        raise CoppiceError("--regularise can't reach into your own training function: call reg.step() there (coppice.regulariser)")

    def work() -> Json:
        model = to_train(bench, before)
        known = {key: budget for key, budget in budgets.items() if key != "latency"}
        steps = epochs * steps_of(bench)
        reg = regulariser(
            model, bench.coupling, config.regularise, steps=steps, target=known, strength=config.strength,
            round_to=config.round_to, min_width=config.min_width,
        )  # fmt: skip
        bench.progress.say(f"{name}: {reg.kind} of strength {reg.strength:.3g}")
        results = trained(bench, name, model, before, epochs, along=reg)
        bench.progress.say(f"{name}: {reg.said()}")
        plan = make_plan(bench.coupling, {}).to_json()
        state = bench.run.save_state(name, model.state_dict())
        val, training = validate(bench, model, name), [asdict(result) for result in results]
        facts = {"kind": reg.kind, "strength": reg.strength, "said": reg.said()}
        done: Json = {"epochs": epochs, "training": training, "optimizer": how_trained(bench, before, epochs)}
        return asdict(replace(before, stage=name, plan=plan, state=state, val=val, regularised=facts, **done))

    return as_snapshot(bench.run.stage(name, work, shared=True))
