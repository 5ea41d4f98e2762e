"""The options of `coppice prune` that cut or shrink while training, make single weights zero, and quantise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

CutAfter = Annotated[
    str | None,
    typer.Option("--cut-after", help="train the model, and cut it after these shares of the epochs, such as 0.33", metavar="SHARE"),
]
Regularise = Annotated[
    str | None,
    typer.Option("--regularise", help="shrink before the cut: group-lasso, slimming, l1, l2, growing or soft [don't]", metavar="KIND"),
]
Strength = Annotated[str | None, typer.Option("--strength", help="of it: auto, or a number [auto]")]
Sparsity = Annotated[float | None, typer.Option("--sparsity", help="share of single weights to make zero, such as 0.9 [none]")]
NofM = Annotated[str | None, typer.Option("--nm", help="of every M weights along the input N stay, such as 2:4 [none]", metavar="N:M")]
MaskCriterion = Annotated[
    str | None,
    typer.Option("--mask-criterion", help="magnitude, gradient, taylor, movement, wanda, sparsegpt or random [magnitude]"),
]
MaskScope = Annotated[
    str | None, typer.Option("--mask-scope", help="what competes: global, layer, row or erk [auto: what suits the criterion]")
]
MaskSchedule = Annotated[
    str | None, typer.Option("--mask-schedule", help="one-shot, iterative (in rounds), or cubic (while training) [one-shot]")
]
MaskSteps = Annotated[int | None, typer.Option("--mask-steps", help="rounds of the iterative schedule [3]")]

Int8 = Annotated[bool | None, typer.Option("--int8/--no-int8", help="quantise the exported model too, judged on the test split [no]")]

_FIELDS = {
    "sparsity": "sparsity", "nm": "nm", "mask_criterion": "criterion", "mask_scope": "scope", "mask_schedule": "schedule",
    "mask_steps": "steps",
}  # fmt: skip


def taken_from(given: dict[str, Any]) -> Mapping[str, Any]:
    """The fields of a `MaskRecipe` among the options given, taken out of them."""
    return {name: given.pop(option) for option, name in _FIELDS.items() if option in given}
