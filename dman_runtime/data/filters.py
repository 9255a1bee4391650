"""What may be left out of a log before a model is evaluated on it. No libraries: the command line reads this."""

from __future__ import annotations

from dataclasses import dataclass, fields

from dman_runtime.data.log_options import option


@dataclass(frozen=True)
class Filters:
    """Limits for `Interactions.filtered`."""

    min_user_events: int = option(0, "leave out users with fewer events")
    min_item_events: int = option(0, "leave out items with fewer events")


FILTERS = tuple(field.name for field in fields(Filters))
