"""From the options of the command to a source and what reads its messages."""

from __future__ import annotations

from pathlib import Path

from dman_runtime.data.log_options import AUTO
from dman_runtime.errors import UsageError
from dman_runtime.ingest.base import Source
from dman_runtime.ingest.broker import SCHEME, Broker, library, read_settings
from dman_runtime.ingest.events import EventReader, Fields, csv_fields, json_fields, protobuf_fields
from dman_runtime.ingest.file import FileSource
from dman_runtime.ingest.kafka import KafkaSource
from dman_runtime.ingest.options import IngestOptions


def check_source(name: str, options: IngestOptions) -> None:
    """Raises UsageError for what can be known to fail before anything is opened."""
    if name.startswith(SCHEME):
        library()
        Broker.parse(name, {})
        wrong, what = {"position": options.position}, "a topic: its group has the position"
    elif "://" in name:
        raise UsageError(f"{name!r:.200} is no known source", "name kafka://host:9092/topic, or a file",
                         parameter="from")  # fmt: skip
    else:
        wrong, what = {"partitions": options.partitions, "kafka_options": options.kafka_options}, "a file"
    for parameter, value in wrong.items():
        if value:
            raise UsageError(f"{parameter} is not for {what}", "leave it out", parameter=parameter)
    known = ("json", "protobuf") if name.startswith(SCHEME) else ("json", "csv")
    if _format(name, options) not in known:
        raise UsageError(
            f"{name} cannot be read as {options.event_format}", f"choose {' or '.join(known)}", parameter="event_format"
        )


def _format(name: str, options: IngestOptions) -> str:
    if options.event_format != AUTO:
        return options.event_format
    return "csv" if not name.startswith(SCHEME) and Path(name).suffix.lower() == ".csv" else "json"


def open_source(name: str, options: IngestOptions, *, user_ids: str, item_ids: str) -> tuple[Source, EventReader]:
    """A source that was checked, and what reads its messages. Raises UsageError, SourceError."""
    file: FileSource | None = None
    if name.startswith(SCHEME):
        settings = read_settings(Path(options.kafka_options)) if options.kafka_options else {}
        source: Source = KafkaSource(
            Broker.parse(name, settings),
            group=options.group,
            partitions=options.listed_partitions(),
            start=options.start,
            producer=options.producer,
            once=options.once,
            dead_letters=options.dead_letters,
        )
    else:
        path = Path(name)
        source = file = FileSource(
            path,
            position=Path(options.position) if options.position else path.with_name(f"{path.name}.position"),
            header=_format(name, options) == "csv",
            producer=options.producer,
            once=options.once,
            dead_letters=Path(options.dead_letters) if options.dead_letters else None,
        )
    return source, EventReader(options, _fields(name, options, file), user_ids=user_ids, item_ids=item_ids)


def _fields(name: str, options: IngestOptions, file: FileSource | None) -> Fields:
    if file is not None and _format(name, options) == "csv":
        return csv_fields(options, file.header)
    return protobuf_fields(options) if _format(name, options) == "protobuf" else json_fields
