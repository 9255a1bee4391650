"""The results of an AdminClient.

`text` is what the command of `dman-runtime` prints for people. The other fields are those that it prints with --json.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is: `done` of `total`, which may grow, after so many `seconds`. Of a rebuild: events."""

    done: int
    total: int
    seconds: float

    @property
    def seconds_left(self) -> float | None:
        """At the speed so far; None as long as nothing is done."""
        return self.seconds * (self.total - self.done) / self.done if self.done else None


@dataclasses.dataclass(frozen=True, slots=True)
class GenerationInfo:
    """The states that a store has of one bundle.

    `records` users have one; those of `current` cover the history. `share` is that of the users that the bundle was
    activated for, 0 to 1.
    """

    number: int
    bundle_id: str
    records: int
    current: int
    bytes: int
    share: float


@dataclasses.dataclass(frozen=True, slots=True)
class Generations:
    """The bundles that a store of so many `users` has states of, oldest first."""

    users: int
    generations: tuple[GenerationInfo, ...]
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Rollout:
    """Which bundle answers whom.

    `active` answers all users but the `share` of `trial`. Empty: none was activated, and servers use what they were
    started with. `prepared` is about to answer. `revision` is one more with each change. `bundles` are the directories
    of the bundles that take part, by id, as far as they are known.
    """

    revision: int
    active: str
    trial: str
    share: float
    prepared: str
    bundles: Mapping[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Activated:
    """What was activated: the fields of `Rollout` after the change, the bundle that answered `before`, how many
    processes of `servers` had loaded the bundle first, and how many states were `caught_up` first."""

    revision: int
    active: str
    trial: str
    share: float
    prepared: str
    bundles: Mapping[str, str]
    before: str
    servers: int
    caught_up: int
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Rebuilt:
    """What a rebuild did, in a store of so many `users`.

    `rebuilt` records were made or brought up to the history, for which `events` were encoded. `lagging` users have been
    changed meanwhile, and are caught up when they are first touched.
    """

    users: int
    rebuilt: int
    events: int
    lagging: int
    bundle_id: str
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Dropped:
    """So many records of a bundle were removed."""

    bundle_id: str
    dropped: int
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class BackedUp:
    """A copy of the store at `path` on the server's machine. `counts` says what was read back, by kind."""

    path: str
    bytes: int
    counts: Mapping[str, int]
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Expired:
    """What became of so many `users`.

    `expired` were deleted, with `events`: their latest event is of `before`, in seconds since 1970. With `dry_run` none
    was. `untimed` users were kept, as no time of any of their events is known.
    """

    users: int
    expired: int
    events: int
    untimed: int
    before: int
    dry_run: bool
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Switched:
    """`changed` items were switched, `unchanged` ones were so already. The store has no items of the `unknown` ids. So
    many items are `off` now."""

    changed: int
    unchanged: int
    unknown: tuple[str, ...]
    off: int
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class ItemsAdded:
    """`added` items are new, `unchanged` ones were there already, just so. The bundle was trained with the `known`
    ones: nothing was done about them. It cannot serve the `unusable` ones, for the reasons given. The store has `total`
    additions."""

    added: int
    unchanged: int
    known: tuple[str, ...]
    unusable: Mapping[str, str]
    total: int
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Verified:
    """What was read in a store, by kind, in `counts`. It is `sound` if there are no problems; `problems` has the first
    of `problem_count`."""

    path: str
    counts: Mapping[str, int]
    problem_count: int
    problems: tuple[str, ...]
    sound: bool
    text: str
