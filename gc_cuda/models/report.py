"""What :func:`gc_cuda.accelerate` found and did."""

from __future__ import annotations

from typing import Any, NamedTuple

ACCELERATED = "accelerated"
ALREADY = "accelerated before"
LEFT_ALONE = "left alone"

OWN_FORWARD = "its own forward"  # under torch.compile

BLOCK, TAIL, MIDDLE = "block", "tail", "middle"
_DONE = {BLOCK: "run fused", TAIL: "run fused", MIDDLE: "are computed again"}


class Entry(NamedTuple):
    """A block of the model; a tail: the end of a bottleneck; or a middle of a residual block."""

    name: str  # its path in the model; of a tail, that of the bottleneck; of a middle, of the residual block
    kind: str  # the class, by its full name
    action: str  # ACCELERATED, ALREADY or LEFT_ALONE
    reason: str  # why it was left alone
    part: str = BLOCK  # or TAIL, or MIDDLE
    compiled: str = ""  # what runs under torch.compile, if something else
    formula: str = ""  # of a block that runs fused: what it computes


class Report(NamedTuple):
    """What :func:`accelerate` found and did; it prints as a table."""

    entries: tuple[Entry, ...]
    remark: str = ""

    @property
    def accelerated(self) -> list[str]:
        """The names of the blocks that run fused now."""
        return [entry.name for entry in self._all(BLOCK) if entry.action != LEFT_ALONE]

    @property
    def left_alone(self) -> dict[str, str]:
        """The names of the others, and why."""
        return {entry.name: entry.reason for entry in self._all(BLOCK) if entry.action == LEFT_ALONE}

    @property
    def tails(self) -> list[str]:
        """The names of the bottlenecks whose tail is one operation now."""
        return [entry.name for entry in self._all(TAIL) if entry.action != LEFT_ALONE]

    @property
    def tails_left_alone(self) -> dict[str, str]:
        """The names of the other bottlenecks with a block in their tail, and why."""
        return {entry.name: entry.reason for entry in self._all(TAIL) if entry.action == LEFT_ALONE}

    @property
    def middles(self) -> list[str]:
        """The names of the residual blocks whose middle is computed again in the backward pass."""
        return [entry.name for entry in self._all(MIDDLE) if entry.action != LEFT_ALONE]

    @property
    def middles_left_alone(self) -> dict[str, str]:
        """The names of the other residual blocks with a block in their middle, and why."""
        return {entry.name: entry.reason for entry in self._all(MIDDLE) if entry.action == LEFT_ALONE}

    @property
    def left_to_the_compiler(self) -> list[str]:
        """The names of the accelerated blocks that run their own forward under torch.compile."""
        return [entry.name for entry in self.entries if entry.compiled]

    def _all(self, part: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.part == part]

    def __str__(self) -> str:
        if not self.entries:
            return "\n".join(filter(None, [f"gc_cuda: {_NONE}", self.remark]))
        rows = [_HEADS, *map(_row, self.entries)]
        shown = [column for column in zip(*rows) if any(column[1:])]
        widths = [max(map(len, column)) for column in shown]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in zip(*shown)
        ]
        totals = [
            f"{len(served)} of {len(self._all(part))} {part}s {_DONE[part]}"
            for part, served in ((BLOCK, self.accelerated), (TAIL, self.tails), (MIDDLE, self.middles))
            if self._all(part)
        ]
        rule = "  ".join("-" * width for width in widths)
        return "\n".join(filter(None, [lines[0], rule, *lines[1:], *totals, self.remark]))


_NONE = (
    "no global context, squeeze-and-excitation or other block that scales or shifts a map by what it pools"
)
_HEADS = ("name", "class", "what was done", "formula", "reason", "under torch.compile")


def _row(entry: Entry) -> tuple[str, ...]:
    kind = entry.kind if entry.part == BLOCK else f"{entry.part} of {entry.kind}"
    return entry.name or "(itself)", kind, entry.action, entry.formula, entry.reason, entry.compiled


def formula_of(recipe: Any) -> str:
    """What a block computes, by where its parameters are."""
    mask, *branches = recipe.parameters()
    pooled = "attention(x)" if mask else "mean(x)"
    add, mul = (_transform(names, recipe.activation, pooled) for names in branches)
    return f"x{f' * {recipe.gate}({mul})' if mul else ''}{f' + {add}' if add else ''}"


def _transform(names: Any, activation: str, pooled: str) -> str:
    if not names:
        return ""
    first, last = (
        "" if _is_absent(*names[place]) else f" + {word}" for place, word in ((1, "b1"), (-1, "b2"))
    )
    hidden = f"W1 {pooled}{first}"
    return f"W2 {activation}({f'LN({hidden})' if len(names) > 4 else hidden}){last}"


def _is_absent(part: Any, name: str) -> bool:
    return part._parameters.get(name, part) is None
