"""Distributions of draws: what copy k of a seed is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from itertools import product
from typing import TypeAlias

from ..errors import DrawError, UnknownNameError
from ..hashing import JSON
from .draw import IDENTITY, OPERATIONS, Draw
from .geometry import D4, hflip, quarter_turn, vflip
from .operation import Operation
from .parameters import SEED, Allowed, Stream

Number: TypeAlias = int | float
Range: TypeAlias = tuple[Number, Number]

_DRAWN_SEED: Range = (0, 2**32 - 1)
_PROBABILITY = Allowed(0.0, 1.0)
_COUNT = Allowed(0, 2**31 - 1, "integer")


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How a policy makes one kind of operation."""

    build: Callable[..., Operation]
    allowed: Mapping[str, Allowed]
    defaults: Mapping[str, Range]


def _recipe_of(kind: type[Operation]) -> _Recipe:
    defaults: dict[str, Range] = {
        field.name: (field.default, field.default)
        for field in fields(kind)  # type: ignore[arg-type]
        if field.default is not MISSING
    }
    if "seed" in kind.allowed:
        defaults["seed"] = _DRAWN_SEED
    return _Recipe(kind, kind.allowed, defaults)


_RECIPES: Mapping[str, _Recipe] = {
    "hflip": _Recipe(hflip, {}, {}),
    "vflip": _Recipe(vflip, {}, {}),
    "quarter_turn": _Recipe(quarter_turn, {"turns": Allowed(0, 3, "integer")}, {"turns": (1, 3)}),
    **{name: _recipe_of(kind) for name, kind in OPERATIONS.items() if kind is not D4},
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One operation of a policy: how likely it is, and the ranges of its parameters.

    `Entry.of` is the convenient way to make one.

    Parameters
    ----------
    operation : str
        ``"hflip"``, ``"vflip"``, ``"quarter_turn"``, ``"scale"``, ``"affine"``, ``"elastic"``,
        ``"brightness"``, ``"contrast"``, ``"blur"`` or ``"noise"``.
    probability : float
        0 to 1.
    ranges : tuple of (parameter, (low, high))
        Each parameter is drawn uniformly, both ends included. Those left out take the operation's
        default; a seed is drawn, and so are 1 to 3 quarter turns.

    Raises
    ------
    DrawError
        If the operation, a parameter, or a value that could be drawn is not allowed.
    """

    operation: str
    probability: float = 1.0
    ranges: tuple[tuple[str, Range], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.operation, str) or self.operation not in _RECIPES:
            raise DrawError(
                f"the policy's operation is {self.operation!r}: "
                f"expected one of {', '.join(_RECIPES)}"
            )
        where = f"the policy's {self.operation} probability"
        object.__setattr__(self, "probability", _PROBABILITY.check(where, self.probability))
        object.__setattr__(self, "ranges", _complete_ranges(self.operation, dict(self.ranges)))
        self._check_corners()

    @classmethod
    def of(
        cls, operation: str, probability: float = 1.0, /, **ranges: Number | tuple[Number, Number]
    ) -> Entry:
        """Make an entry: ``Entry.of("blur", 0.5, kernel=5, sigma=(0.01, 2.0))``.

        A single number is a parameter that is always the same.
        """
        return cls(operation, probability, tuple((name, _pair(r)) for name, r in ranges.items()))

    def to_json(self) -> dict[str, JSON]:
        """Give operation, probability and every range."""
        ranges: dict[str, JSON] = {name: [low, high] for name, (low, high) in self.ranges}
        return {"operation": self.operation, "probability": self.probability, "ranges": ranges}

    @classmethod
    def from_json(cls, value: object) -> Entry:
        """Make the entry that `to_json` wrote, or one written by hand.

        Raises
        ------
        DrawError
            As the constructor, and for fields that an entry doesn't have.
        """
        given = _object(value, "the policy's entry", ("operation", "probability", "ranges"))
        ranges = _object(given.get("ranges", {}), "the policy's ranges", None)
        pairs = tuple((name, _pair(r)) for name, r in ranges.items())
        return cls(given.get("operation"), given.get("probability", 1.0), pairs)  # type: ignore[arg-type]

    def sample(self, stream: Stream) -> Operation | None:
        """Draw the operation, or None; takes one number for it and one for each parameter."""
        recipe = _RECIPES[self.operation]
        happens = stream.uniform() < self.probability
        values = {
            name: recipe.allowed[name].pick(low, high, stream.uniform())
            for name, (low, high) in self.ranges
        }
        return recipe.build(**values) if happens else None

    def _check_corners(self) -> None:
        names = [name for name, _ in self.ranges]
        for corner in product(*(bounds for _, bounds in self.ranges)):
            _RECIPES[self.operation].build(**dict(zip(names, corner, strict=True)))


def _pair(value: object) -> Range:
    if isinstance(value, list | tuple) and len(value) == 2:
        return value[0], value[1]
    return value, value  # type: ignore[return-value]  # checked where it is used


def _complete_ranges(operation: str, given: Mapping[str, Range]) -> tuple[tuple[str, Range], ...]:
    """Check ranges and add the defaults, in the order of their names."""
    recipe = _RECIPES[operation]
    unknown = sorted(set(given) - set(recipe.allowed))
    if unknown:
        raise DrawError(
            f"the policy's {operation} has no parameter {unknown[0]!r}: "
            f"expected {', '.join(recipe.allowed) or 'none'}"
        )
    ranges = {**recipe.defaults, **given}
    missing = sorted(set(recipe.allowed) - set(ranges))
    if missing:
        raise DrawError(
            f"the policy's {operation} lacks a range of {missing[0]}: "
            f"expected {recipe.allowed[missing[0]]}"
        )
    return tuple(
        (name, _checked_range(f"the policy's {operation} {name}", allowed, ranges[name]))
        for name, allowed in sorted(recipe.allowed.items())
    )


def _checked_range(where: str, allowed: Allowed, bounds: Range) -> Range:
    low, high = (allowed.check(where, bound) for bound in bounds)
    if low > high:
        raise DrawError(f"{where} is from {low!r} to {high!r}: expected the lower one first")
    return low, high


def _object(value: object, where: str, known: tuple[str, ...] | None) -> Mapping[str, JSON]:
    if not isinstance(value, Mapping):
        raise DrawError(f"{where} is {value!r}: expected an object")
    for key in value:
        if known is not None and key not in known:
            raise DrawError(f"{where} has the field {key!r}: expected {', '.join(known)}")
    return value


@dataclass(frozen=True, slots=True)
class Policy:
    """A distribution of draws.

    Parameters
    ----------
    entries : tuple of Entry
        Each happens or not, on its own.
    shuffle : bool
        Whether the order is drawn too; else it is that of the entries.

    Raises
    ------
    DrawError
        If an entry is no `Entry`, or `shuffle` no bool.

    Examples
    --------
    >>> policy = Policy((Entry.of("hflip", 0.5), Entry.of("scale", 0.9, factor=(0.8, 1.0))))
    >>> Policy.from_json(policy.to_json()) == policy
    True
    """

    entries: tuple[Entry, ...] = ()
    shuffle: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", tuple(self.entries))
        for i, entry in enumerate(self.entries):
            if not isinstance(entry, Entry):
                raise DrawError(f"entry {i} of the policy is {entry!r}: expected an Entry")
        if not isinstance(self.shuffle, bool):
            raise DrawError(f"the policy's shuffle is {self.shuffle!r}: expected True or False")

    def to_json(self) -> dict[str, JSON]:
        """Give the whole policy, on which the draws depend."""
        return {"entries": [entry.to_json() for entry in self.entries], "shuffle": self.shuffle}

    @classmethod
    def from_json(cls, value: object) -> Policy:
        """Make the policy that `to_json` wrote, or one written by hand.

        Raises
        ------
        DrawError
            If a field, an operation, a parameter or a value is not allowed.
        """
        given = _object(value, "the policy", ("entries", "shuffle"))
        entries = given.get("entries", [])
        if not isinstance(entries, list):
            raise DrawError(f"the policy's entries are {entries!r}: expected a list")
        return cls(tuple(Entry.from_json(entry) for entry in entries), given.get("shuffle", False))  # type: ignore[arg-type]

    def sample(self, stream: Stream) -> Draw:
        """Draw from the distribution."""
        operations = [entry.sample(stream) for entry in self.entries]
        if self.shuffle:
            for last in range(len(operations) - 1, 0, -1):
                other = int(stream.uniform() * (last + 1))
                operations[last], operations[other] = operations[other], operations[last]
        return Draw(tuple(operation for operation in operations if operation is not None))


_FLIPS = (Entry.of("hflip", 0.5), Entry.of("vflip", 0.5))
_GEOMETRY = (
    *_FLIPS,
    Entry.of("quarter_turn", 0.5),
    Entry.of("scale", 0.9, factor=(0.8, 1.0)),
)

PRESETS: Mapping[str, Policy] = {
    "none": Policy(),
    "flips": Policy(_FLIPS),
    "geometric": Policy(_GEOMETRY, shuffle=True),
    "intensity": Policy(
        (
            Entry.of("brightness", factor=(0.95, 1.05)),
            Entry.of("contrast", factor=(0.95, 1.05)),
            Entry.of("noise", sigma=0.02),
        ),
        shuffle=True,
    ),
    "default": Policy(
        (
            Entry.of("brightness", factor=(0.7, 1.3)),
            Entry.of("contrast", factor=(0.7, 1.3)),
            *_GEOMETRY,
            Entry.of("blur", kernel=5, sigma=(0.01, 2.0)),
        ),
        shuffle=True,
    ),
}
"""Policies by name.

The families of the predecessor's pipelines: ``"default"`` of ``PretrainedAugmentations``,
``"geometric"`` of ``PretrainedMovementAugmentations``, ``"intensity"`` of
``PretrainedIntensityAugmentations`` (``trackastra_pretrained_feats/pretrained_augmentations.py``).
"""


@dataclass(frozen=True, slots=True)
class Augmentations:
    """Numbered copies drawn from a policy.

    Copy k is a function of (policy, seed, k) alone: it is the same however many copies there are,
    in whatever order, thread, process or on whatever machine they are drawn.

    Parameters
    ----------
    policy : str or Policy
        A preset: ``"none"``, ``"flips"``, ``"geometric"``, ``"intensity"``, ``"default"``; or one
        of your own. A preset and the equal policy give the same copies.
    copies : int
        How many copies there are beside copy 0, the identity; 0 or more.
    seed : int
        0 to 2**63 - 1.

    Raises
    ------
    UnknownNameError
        If there is no preset of that name.
    DrawError
        If `copies` or `seed` is not allowed, or `policy` is neither a name nor a `Policy`.

    Examples
    --------
    >>> augmentations = Augmentations("flips", copies=3, seed=0)
    >>> augmentations.draw(0).is_identity
    True
    """

    policy: str | Policy = "default"
    copies: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        _policy(self.policy)
        object.__setattr__(self, "copies", _COUNT.check("copies", self.copies))
        object.__setattr__(self, "seed", SEED.check("seed", self.seed))

    def draw(self, copy: int) -> Draw:
        """Give copy number `copy`; copy 0 is the identity.

        Raises
        ------
        DrawError
            If `copy` is not from 0 to `copies`.
        """
        number = Allowed(0, self.copies, "integer").check("copy", copy)
        if number == 0:
            return IDENTITY
        policy = _policy(self.policy)
        return policy.sample(Stream([policy.to_json(), self.seed, number]))

    def draws(self) -> tuple[Draw, ...]:
        """Give all copies, 0 to `copies`."""
        return tuple(self.draw(copy) for copy in range(self.copies + 1))

    def name_of(self, copy: int) -> str:
        """Name a copy for people; what it is stands in its draw."""
        policy = self.policy if isinstance(self.policy, str) else "a policy of its own"
        return f"copy {copy} of seed {self.seed} ({policy})"

    def to_json(self) -> dict[str, JSON]:
        """Give policy (in full), copies and seed."""
        policy = _policy(self.policy).to_json()
        return {"policy": policy, "copies": self.copies, "seed": self.seed}


def _policy(policy: str | Policy) -> Policy:
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str):
        raise DrawError(
            f"policy is {policy!r}: expected a Policy or one of the names {', '.join(PRESETS)}"
        )
    if policy not in PRESETS:
        raise UnknownNameError("policy", policy, PRESETS)
    return PRESETS[policy]
