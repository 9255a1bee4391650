"""Which columns of a log hold the users, the items, the times and the positions: as named, or by well-known names."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dman_runtime.data.input_report import InputReport
from dman_runtime.data.log_options import AUTO, NONE, LogOptions
from dman_runtime.data.tables import Tables, quoted
from dman_runtime.errors import InputError

ROLES = ("user", "item", "time", "position")
OWN_NAMES = {"user": "user_id", "item": "item_id", "time": "timestamp", "position": "position"}
# Names of public data sets and of other recommenders, in lower case without anything between letters and digits.
KNOWN_NAMES = {
    "user": "user userid uid visitor visitorid customer customerid reviewerid member memberid account accountid person "
    "personid client clientid viewerid playerid",
    "item": "item itemid iid movie movieid product productid asin parentasin article articleid track trackid song "
    "songid book bookid video videoid news newsid sku stockcode business businessid game gameid page pageid artistid "
    "contentid",
    "time": "timestamp time ts date datetime eventtime eventtimestamp eventdate createdat createdtime unixtime "
    "unixreviewtime unixtimestamp timeofevent occurredat ratedat playedat viewedat clicktime visittime invoicedate "
    "timems timestampms",
    "position": "position",
}
_KNOWN = {role: frozenset(names.split()) for role, names in KNOWN_NAMES.items()}


@dataclass(frozen=True)
class Roles:
    """The column of each role; None for a time or position that is not there or not wanted."""

    user: str
    item: str
    time: str | None
    position: str | None
    position_is_named: bool  # by whoever reads, so that it must be usable

    def by_role(self) -> dict[str, str]:
        return {role: getattr(self, role) or NONE for role in ROLES}

    def columns(self) -> list[str]:
        return [name for name in (self.user, self.item, self.time, self.position) if name]


def find_roles(tables: Tables, options: LogOptions, report: InputReport) -> Roles:
    """The columns to read. What is recognised, and not named, is reported. Raises InputError."""
    given = {role: getattr(options, f"{role}_column") for role in ROLES}
    found: dict[str, str | None] = {}
    for role in ROLES:
        found[role] = _named(tables, role, given[role]) if given[role] != AUTO else _recognised(tables, role, report)
    for role in ("user", "item"):
        if found[role] is None:
            raise _missing(tables, role, options)
    _require_distinct(tables, found, given)
    columns = list(filter(None, found.values()))
    report.other_columns = [name for name in tables.names if name and name not in columns]
    user, item = found["user"] or "", found["item"] or ""
    return Roles(user, item, found["time"], found["position"], position_is_named=given["position"] != AUTO)


def _named(tables: Tables, role: str, name: str) -> str | None:
    if name == NONE and role in ("time", "position") and NONE not in tables.names:
        return None
    if name in tables.names:
        return name
    parameter = f"{role}_column"
    if tables.looks_headerless:
        raise _headerless(tables, f"no column {name!r}")
    remedy = f"name the column that holds the {role}s"
    if role in ("time", "position"):
        remedy += f", or {NONE}"
    if len(known := candidates(tables, role)) == 1:
        remedy += f"; {known[0]} looks like it"
    raise tables.error(f"no column {name!r}; it has: {', '.join(tables.names)[:300]}", remedy, parameter=parameter)


def candidates(tables: Tables, role: str) -> list[str]:
    """The columns whose names are well known for a role."""
    return [name for name in tables.names if re.sub(r"[^a-z0-9]", "", name.lower()) in _KNOWN[role]]


def _recognised(tables: Tables, role: str, report: InputReport) -> str | None:
    if OWN_NAMES[role] in tables.names:
        return OWN_NAMES[role]
    known = candidates(tables, role)
    if len(known) > 1:
        raise tables.error(
            f"{' and '.join(known)} may both hold the {role}s",
            "name the one that does" + (f", or {NONE}" if role == "time" else ""),
            parameter=f"{role}_column",
        )
    if not known:
        return None
    report.notice(
        f"no column {OWN_NAMES[role]!r}: {known[0]!r} is taken for the {role}s, by its name",
        parameter=f"{role}_column",
        weight=60 if role == "time" else 20,
    )
    return known[0]


def _missing(tables: Tables, role: str, options: LogOptions) -> InputError:
    if tables.looks_headerless or not options.header:
        return _headerless(tables, f"no column is known to hold the {role}s")
    names = ", ".join(tables.names)[:300]
    return tables.error(
        f"no column {OWN_NAMES[role]!r}, nor another known name for {role}s; it has: {names}",
        f"name the column that holds the {role}s",
        parameter=f"{role}_column",
    )


def _headerless(tables: Tables, problem: str) -> InputError:
    """The remedy is a complete line of options, as numbers alone tell nobody what to write."""
    values = ", ".join(quoted(value) for value in tables.first_line[:8])
    example = "user_column 1, item_column 2" + (", time_column 3" if len(tables.first_line) > 2 else "")
    return tables.error(
        f"{problem}: its first line ({values}) looks like data, not like names of columns",
        f"read it without a header and name the columns by their numbers, such as {example}",
        parameter="no_header",
    )


def _require_distinct(tables: Tables, found: dict[str, str | None], given: dict[str, str]) -> None:
    for role in ROLES:
        others = [other for other in ROLES if other != role and found[other] == found[role]]
        if found[role] is not None and others and given[role] != AUTO:
            raise tables.error(
                f"column {found[role]!r} is named for two purposes",
                f"name another column for the {role}s",
                parameter=f"{role}_column",
            )
        if found[role] is not None and tables.names.count(found[role] or "") > 1:
            raise tables.error(
                f"{tables.names.count(found[role] or '')} columns are named {found[role]!r}", "keep one of them"
            )
