"""Sizes that the user's code holds: find the attributes that hold a width, and the widths that the code ties together or freezes.

The axes say what a plan may do; the user's Python code must agree, since the pruned model stays the user's own class. So the code is tried
at arbitrary widths (``coppice.torch.trial``), in lockstep with the plan. Where it first disagrees, in this order:

1. an attribute of the module that runs there (or of one around it) that holds an old size is bound to the axis;
2. axes are tied, so that their widths stay in proportion, as in ``head_dim = embed_dim // num_heads``, or a ``chunk`` in halves;
3. the axes of that op are pinned: their size is frozen in the code.

A binding or a tie is taken only if the code then gets past that op, and goes for every module of the same class. Each step binds, ties or
pins something new, so the search ends.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import combinations

from torch import nn

from coppice.axes import Axis, Form, atoms, factors, find, pin, product_of
from coppice.cost import width
from coppice.coupling import Coupling
from coppice.graph import Kind
from coppice.torch.lockstep import inside
from coppice.torch.probes import agrees_at_once
from coppice.torch.trees import modules_of
from coppice.torch.trial import Trials

ROUNDS, ROUNDS_IF_SHORT = 5, 9  # trials with different widths after the last change, where those of coppice.torch.probes don't settle it
EIGHTHS = 3  # the first trials, at some eighths of every width, since code that divides a width (by heads, by groups) asserts that it can
SHORT = 6  # a short axis has few widths, which agree by chance more often; it is also tried at a width of 1
Choice = tuple[str, int | None, int]  # an attribute, its index where it is a sequence, and which of an op's sized axes it holds


def bind_sizes(model: nn.Module, trials: Trials, coupling: Coupling) -> None:
    """Fill ``coupling.bindings`` and ``coupling.ties``, and pin what the code freezes."""
    search = _Search(model, trials, coupling)
    changed = trials.at_rest is not None  # else what did not agree at once does not yet
    seed = agreed = 0
    while agreed < search.rounds() and coupling.prunable:
        at = search.trials.run(search.widths(seed))
        if at is None:
            seed, agreed = seed + 1, agreed + 1
            if agreed == 1 and changed and agrees_at_once(trials, coupling):
                break
        else:
            agreed, changed = 0, True
            search.resolve(*search.earliest(at, seed))
            coupling.refresh()
    check_training(trials, coupling)


def check_training(trials: Trials, coupling: Coupling) -> None:
    """Pin what the heads that only training runs read, where these don't run at other widths; everything, if that is not enough."""
    graph = coupling.graph
    coupling.bundles()
    read = {v for op in graph.ops for v in op.inputs}
    heads = [op for op in graph.training if any(v is not None and graph.values[v].names and v not in read for v in op.inputs)]
    own = [a for op in heads for v in op.inputs if v is not None for dim in coupling.dims[v] for a in atoms(dim)]
    for axes in (own, [a.atom for a in coupling.axes]) if graph.training else ():
        if all(trials.trains(trial_widths(coupling, seed)) for seed in range(EIGHTHS)):
            return
        for atom in axes:
            pin(atom, "code that only training runs does not run at other widths")
        coupling.bundles()


def trial_widths(coupling: Coupling, seed: int) -> dict[Axis, int]:
    """Widths for every bundle that may move; a bundle's do not depend on the others', so that a tie changes only what it ties.

    Every second trial changes all of them. In the others some keep theirs, and short ones may go down to 1 (elsewhere 1 is left out: it
    broadcasts, so a wrong size would hide).
    """
    ids = {axis.atom: axis.id for axis in coupling.axes}
    chosen: dict[Axis, int] = {}
    for bundle in coupling.free_bundles():
        unit = math.gcd(*(a.size for a in bundle))
        levels = next((n for n in (8, 4) if unit % n == 0), unit) if seed < EIGHTHS else unit
        step = [a.size // levels for a in bundle]
        if seed % 2:
            parts = list(range(1 if levels <= SHORT else levels // 3 + 1, levels + 1))
        else:
            parts = [k for k in range(levels // 3 + 1, levels) if k * min(step) > 1] or [max(1, levels - 1)]
        part = parts[_spelled(min(ids[a] for a in bundle), seed // 2, len(parts))]
        chosen.update({a: n * part for a, n in zip(bundle, step, strict=True)})
    return chosen


class _Search:
    def __init__(self, model: nn.Module, trials: Trials, coupling: Coupling) -> None:
        self.coupling, self.trials = coupling, trials
        self.modules = dict(modules_of(model))
        self.by_module: dict[str, list[int]] = defaultdict(list)
        for step in self.trials.steps:  # copies don't count: whether there is one depends on strides, so modules of one class would differ
            self.by_module[coupling.graph.ops[step.index].module].append(step.index)
        if self.trials.at_rest is not None:
            op = coupling.graph.ops[self.trials.steps[self.trials.at_rest].index]
            for axis in coupling.prunable:
                pin(axis.atom, f"the code does not run the same ops twice (first at {op.name} in {op.module or 'the model'})")
            coupling.refresh()

    def rounds(self) -> int:
        """How many trials must agree."""
        units = [math.gcd(*(a.size for a in bundle)) for bundle in self.coupling.free_bundles()]
        return ROUNDS_IF_SHORT if any(unit <= SHORT for unit in units) else ROUNDS

    def widths(self, seed: int) -> dict[Axis, int]:
        return trial_widths(self.coupling, seed)

    def _others(self, seed: int) -> tuple[int, int]:
        """Two more trials of the same kind: one in which some axes keep their width, and one that changes all."""
        if seed < EIGHTHS:
            return (seed + 1) % EIGHTHS, (seed + 2) % EIGHTHS
        return seed + 1, seed + 4

    def earliest(self, at: int, seed: int) -> tuple[int, int]:
        """The first step, and the trial, at which the code disagrees, among this trial and the others that a remedy is tried in."""
        for other in self._others(seed):
            earlier = self.trials.run(self.widths(other), until=at - 1) if at else None
            if earlier is not None:
                return self.earliest(earlier, other)
        return at, seed

    def resolve(self, at: int, seed: int) -> None:
        """Bind, tie or pin, so that the code gets past step ``at``."""
        k = self.trials.steps[at].index
        widths = self.widths(seed)

        def works() -> bool:  # at these widths, and not by chance: at others too
            return all(self.trials.run(self.widths(s), until=at) is None for s in (seed, *self._others(seed)))

        if not self._bind_attribute(k, works, widths) and not self._tie(k, seed, works, widths):
            self._pin(k, works, widths)

    def _changed(self, axis: Axis, widths: dict[Axis, int]) -> bool:
        return width(axis, widths) != find(axis).size

    def sized(self, k: int) -> list[Axis]:
        """Every axis that op ``k`` could be told the size of: its results' dims, its operands' dims, their parts, its letters."""
        op = self.coupling.graph.ops[k]
        dims = [a for v in (*op.outputs, *op.inputs) if v is not None for a in self.coupling.dims[v]]
        return [part for axis in (*self.coupling.ops[k].letters.values(), *dims) for part in _within(axis)]

    def _around(self, path: str) -> Iterator[str]:
        """The module and those around it, innermost first."""
        yield path
        while path:
            path = path.rpartition(".")[0]
            yield path

    def _alike(self, path: str, k: int) -> Iterator[tuple[str, int]]:
        """``(path, op)`` first, then the same op in every other module of the class of the module at ``path``."""
        yield path, k
        op = self.coupling.graph.ops[k]
        suffix = op.module[len(path) :]
        ordinal = self.by_module[op.module].index(k)
        for other, module in self.modules.items():
            if other != path and type(module) is type(self.modules[path]) and path:
                there = self.by_module.get(other + suffix, [])
                if ordinal < len(there) and self.coupling.graph.ops[there[ordinal]].rule == op.rule:
                    yield other, there[ordinal]

    # -- attributes ---------------------------------------------------------------------------------------------

    def _bind_attribute(self, k: int, works: Callable[[], bool], widths: dict[Axis, int]) -> bool:
        sized = self.sized(k)
        first = {find(a): i for i, a in reversed(list(enumerate(sized)))}
        changed = sorted((i, a.size) for a, i in first.items() if self._changed(a, widths))
        for path in self._around(self.coupling.graph.ops[k].module):
            singles = [[c] for c in self._candidates(path, changed)]
            sequences = list(self._sequences(path, changed))
            pairs = [[*a, *b] for a, b in combinations(singles, 2) if a[0][:2] != b[0][:2]]
            if any(self._try_binding(path, k, chosen, works) for chosen in (*singles, *sequences, *pairs[:32])):
                return True
            if self._bind_several(path, k, singles, works):
                return True
        return False

    def _try_binding(self, path: str, k: int, chosen: list[Choice], works: Callable[[], bool]) -> bool:
        before = dict(self.coupling.bindings)
        self._bind_like(path, k, chosen)
        if works():
            return True
        self._restore(before)
        return False

    def _bind_several(self, path: str, k: int, singles: list[list[Choice]], works: Callable[[], bool]) -> bool:
        """A size made of three or more attributes: all that fit, each as the first axis of its size, less those not needed."""
        before = dict(self.coupling.bindings)
        first = {(attribute, index): (attribute, index, position) for [(attribute, index, position)] in reversed(singles)}
        chosen = list(first.values())
        if len(chosen) < 3 or not self._try_binding(path, k, chosen, works):
            return False
        for choice in list(chosen):
            fewer, found = [c for c in chosen if c != choice], dict(self.coupling.bindings)
            self._restore(before)
            if self._try_binding(path, k, fewer, works):
                chosen = fewer
            else:
                self._restore(found)
        return True

    def _restore(self, bindings: Mapping[tuple[str, str, int | None], Axis]) -> None:
        self.coupling.bindings.clear()
        self.coupling.bindings.update(bindings)

    def _held(self, path: str) -> Iterator[tuple[str, int | None, int]]:
        """``(attribute, index, number)`` of every whole number that the module at ``path`` holds and that is not bound yet."""
        for attribute, value in vars(self.modules[path]).items():
            held = [(None, value)] if type(value) is int else list(enumerate(value)) if isinstance(value, (tuple, list)) else []
            for index, number in held:
                if type(number) is int and (path, attribute, index) not in self.coupling.bindings:
                    yield attribute, index, number

    def _candidates(self, path: str, changed: list[tuple[int, int]]) -> Iterator[Choice]:
        for attribute, index, number in self._held(path):
            yield from ((attribute, index, position) for position, size in changed if number == size)

    def _sequences(self, path: str, changed: list[tuple[int, int]]) -> Iterator[list[Choice]]:
        """A whole sequence at once: its numbers are the sizes of axes in the same order (the pieces of a split)."""
        numbers: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for attribute, index, number in self._held(path):
            if index is not None:
                numbers[attribute].append((index, number))
        for attribute, items in numbers.items():
            left = list(changed)
            chosen: list[Choice] = []
            for index, number in items:
                position = next((p for p, size in left if size == number), None)
                if position is not None:
                    chosen.append((attribute, index, position))
                    left = [(p, size) for p, size in left if p != position]
            if len(chosen) > 1:
                yield chosen

    def _bind_like(self, path: str, k: int, chosen: list[Choice]) -> None:
        """Bind the chosen attributes here and, where they hold the old size too, in every module of the same class."""
        for other, op in self._alike(path, k):
            sized = self.sized(op)
            for attribute, index, position in chosen:
                value = getattr(self.modules[other], attribute, None)
                number = value if index is None else value[index] if isinstance(value, (tuple, list)) and len(value) > index else None
                if position < len(sized) and number == find(sized[position]).size:
                    self.coupling.bindings[other, attribute, index] = sized[position]
                    if index is not None:
                        self.coupling.sequences[other, attribute] = tuple(value)  # type: ignore[arg-type]

    # -- ties ---------------------------------------------------------------------------------------------------

    def _tie(self, k: int, seed: int, works: Callable[[], bool], widths: dict[Axis, int]) -> bool:
        alike = [op for _, op in self._alike(self.coupling.graph.ops[k].module, k)]
        if self.coupling.graph.ops[k].rule == "take_apart":

            def or_bound() -> bool:  # split((h, h)): one number for pieces of one width
                return works() or self._bind_attribute(k, works, self.widths(seed))

            if self._try_tie([self._pieces(op) for op in alike], or_bound):
                return True
            read = range(len(self._entering(k)))  # split((c, c, n)) with a c that was read
            if any(self._try_tie([self._pieces_and(j, op) for op in alike], works) for j in read):
                return True
        choices = [[choice(op) for op in alike] for choice in self._tie_choices(k, widths)]
        return any(self._try_tie(sets, works, pick) for pick in (0, 1) for sets in choices)

    def _pieces_and(self, j: int, k: int) -> list[Axis]:
        """Axis ``j`` of those that were read, and the pieces of op ``k`` that are multiples of it."""
        whole = self._entering(k)[j : j + 1]
        return [*whole, *(p for p in self._pieces(k) for a in whole if p.size % find(a).size == 0 and find(a).size > 1)]

    def _tie_choices(self, k: int, widths: dict[Axis, int]) -> Iterator[Callable[[int], list[Axis]]]:
        """What might be in proportion at op ``k``, each as a function that names the same axes at the like op of another module."""
        own, read = self._own(k), self._entering(k)
        seen: set[tuple[int, ...]] = set()
        for i, mine in enumerate(own):
            for j, theirs in enumerate(read):
                pair = (*map(id, factors(mine)), 0, id(theirs))
                if theirs.size == mine.size and pair not in seen and (self._changed(theirs, widths) or self._changed(mine, widths)):
                    seen.add(pair)
                    yield partial(self._pair, i, j)

    def _pieces(self, k: int) -> list[Axis]:
        op = self.coupling.graph.ops[k]
        return [self.coupling.dims[v][op.attrs["dim"]] for v in op.outputs]

    def _pair(self, i: int, j: int, k: int) -> list[Axis]:
        own, read = self._own(k), self._entering(k)
        fits = i < len(own) and j < len(read) and own[i].size == read[j].size and read[j] is not own[i]
        return [read[j], own[i]] if fits else []

    def _own(self, k: int) -> list[Axis]:
        return [run for a in self.sized(k) for run in _runs(a)]

    def _entering(self, k: int) -> list[Axis]:
        """The axes of what the module that runs op ``k`` has read so far, which its code can take a size from."""
        path = self.coupling.graph.ops[k].module
        before = [i for i in self.by_module[path] if i <= k]
        within = [i for i, o in enumerate(self.coupling.graph.ops[:k]) if inside(o.module, path)]
        made = {v for i in within for v in self.coupling.graph.ops[i].outputs}
        given = [i for i in within if any(v not in made for v in self._activations(i))]
        values = [v for i in sorted({*before, *within[:4], *given[:4], k}) for v in self._activations(i)]
        return [find(a) for v in values for a in self.coupling.dims[v]]

    def _activations(self, k: int) -> list[int]:
        """What op ``k`` reads that an op has made."""
        found = [v for v in self.coupling.graph.ops[k].inputs if v is not None]
        return [v for v in found if self.coupling.graph.values[v].kind is Kind.INTERMEDIATE]

    def _try_tie(self, sets: list[list[Axis]], works: Callable[[], bool], pick: int = 0) -> bool:
        """Tie every set of axes that can be; keep it so if the code gets further. ``pick``: which factor of a product moves."""
        bundle_of = {a: bundle for bundle in self.coupling.free_bundles() for a in bundle}
        ties, pinned = len(self.coupling.ties), []
        for axes in map(_unshared, sets):
            free = [_free(a, pick) for a in axes]
            if pick and free == [_free(a) for a in axes]:
                continue
            moving = tuple(dict.fromkeys(a for f in free if f for a in f[0]))
            still = [a for f in free if f for a in f[1]]
            bundles = {bundle_of.get(a, (a,)) for a in moving}
            if None in free or set(moving) & set(still) or len(bundles) < 2:  # already in proportion
                continue
            if math.gcd(*(a.size for bundle in bundles for a in bundle)) == 1:  # none could move any more
                continue
            for a in still:
                if a.pinned is None:
                    pinned.append(a)
                    pin(a, "the code works its size out from other widths")
            self.coupling.ties.append(moving)
        if len(self.coupling.ties) > ties and works():
            return True
        del self.coupling.ties[ties:]
        for a in pinned:
            a.pinned = None
        return False

    # -- pins ---------------------------------------------------------------------------------------------------

    def _pin(self, k: int, works: Callable[[], bool], widths: dict[Axis, int]) -> None:
        """Pin the axes of op ``k``; where it has none to blame, those of the ops before it in the module, then in the modules around it."""
        graph, path = self.coupling.graph, self.coupling.graph.ops[k].module
        for around in self._around(path):
            reason = f"its size is frozen in the code of {type(self.modules[around]).__name__}"
            before = [i for i, op in enumerate(graph.ops[: k + 1]) if inside(op.module, around)]
            outputs = [a for v in graph.ops[k].outputs for a in self.coupling.dims[v]]
            for axes in ([*outputs, *self.coupling.ops[k].letters.values()], self.sized(k), [a for i in before for a in self.sized(i)]):
                changed = {atom: None for axis in axes for atom in atoms(axis) if self._changed(atom, widths)}
                if changed:
                    self._pin_least(list(changed), works, reason)
                    if type(self.modules[path]).__module__.partition(".")[0] != "torch":  # else the code around it is to blame
                        self._pin_alike(k, widths, reason)
                    return
        for atom in widths:  # nothing that ran so far has another width, and still the code took another way
            pin(atom, f"the code does not run the same ops at other widths (first at {graph.ops[k].name} in {path or 'the model'})")

    def _pin_least(self, changed: list[Axis], works: Callable[[], bool], reason: str) -> None:
        """One of the axes if that is enough (a frozen number of heads leaves their width free), or all."""
        for atom in sorted(changed, key=lambda a: a.size) if 1 < len(changed) <= 4 else ():
            atom.pinned = reason
            if works():
                return
            atom.pinned = None
        for atom in changed:
            pin(atom, reason)

    def _pin_alike(self, k: int, widths: dict[Axis, int], reason: str) -> None:
        """In every module of the same class, what the same op's result has at the place of an axis that was pinned here."""
        mine = [atom for v in self.coupling.graph.ops[k].outputs for axis in self.coupling.dims[v] for atom in atoms(axis)]
        for _, other in self._alike(self.coupling.graph.ops[k].module, k):
            theirs = [atom for v in self.coupling.graph.ops[other].outputs for axis in self.coupling.dims[v] for atom in atoms(axis)]
            for here, there in zip(mine, theirs, strict=False):
                if here.pinned == reason and len(mine) == len(theirs):
                    pin(there, reason)


def _spelled(number: int, trial: int, base: int) -> int:
    """Which of ``base`` widths axis ``number`` takes: over pairs of trials its digits, so that no two axes always agree.

    Neighbours are far apart, and the other way round in a pair's second trial, since some widths fit by chance: ``(3 + 4) // 2`` is 3, and
    ``chunk`` cuts 8 into 3, 3 and 2.
    """
    stride = next(n for n in range(max(1, round(0.4 * base)), base + 2) if math.gcd(n, base) == 1)
    place: int = number // base ** (trial // 2) * stride - trial // 2
    return (-1 - place if trial % 2 else place) % base


def _within(axis: Axis) -> Iterator[Axis]:
    """``axis`` and everything below it that may move: how a pinned one is made up may differ between like modules."""
    axis = find(axis)
    yield axis
    for part in axis.parts if axis.pinned is None else ():
        yield from _within(part)


def _runs(axis: Axis) -> Iterator[Axis]:
    """``axis``, and where it is a product every run of neighbouring factors (heads x head dim of a fused q, k, v)."""
    axis = find(axis)
    yield axis
    if axis.form is Form.PRODUCT and axis.pinned is None:
        parts = factors(axis)
        for start in range(len(parts)):
            for stop in range(start + 2, len(parts) + (start > 0)):
                yield product_of(parts[start:stop])


def _unshared(axes: list[Axis]) -> list[Axis]:
    """The axes without the factors that all of them have: those keep the proportion by themselves (the heads of q, k and v)."""
    shared = set.intersection(*(set(factors(a)) for a in axes)) if len(axes) > 1 else set()
    return [product_of([f for f in factors(a) if f not in shared]) for a in axes]


def _free(axis: Axis, pick: int = 0) -> tuple[list[Axis], list[Axis]] | None:
    """The atoms that must move in proportion for ``axis`` to scale, and those that must stand still; None where nothing of it can move.

    Of a product one factor moves, the largest that can (``pick`` 1: the next). Fixed parts of a sum stay as they are; whether the code
    works with that is for a trial to say.
    """
    axis = find(axis)
    if axis.form is Form.CHOICE:
        return _free(axis.parts[0], pick)  # the others are tied to it
    if axis.form is Form.ATOM:
        return None if axis.pinned or axis.size == 1 else ([axis], [])
    if axis.form is Form.SUM:
        parts = [p for p in (_free(p, pick) for p in axis.parts) if p is not None]
        return ([a for p in parts for a in p[0]], [a for p in parts for a in p[1]]) if parts else None
    loose = sorted(((find(p).size, k) for k, p in enumerate(axis.parts) if _free(p, pick) is not None), reverse=True)
    if not loose:
        return None
    chosen = loose[min(pick, len(loose) - 1)][1]
    moving = _free(axis.parts[chosen], pick)
    assert moving is not None
    still = [a for k, p in enumerate(axis.parts) if k != chosen for a in atoms(p) if not a.pinned]
    return moving[0], [*moving[1], *still]
