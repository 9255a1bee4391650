"""A generation: a bundle, opened and checked, with the graphs and the search that serve it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dman_runtime.data.added_items import AddedItem
from dman_runtime.errors import BundleError
from dman_runtime.model import additions, record, recurrence
from dman_runtime.model.answers import KeptAnswers, PersonalAnswer
from dman_runtime.model.bundle import Bundle, open_bundle
from dman_runtime.model.events import KnownEvents
from dman_runtime.model.record import RecordHead
from dman_runtime.model.recurrence import Graphs, Piece
from dman_runtime.model.sketch import return_scores
from dman_runtime.model.state import State
from dman_runtime.retrieval.base import Added, Finder, Retriever
from dman_runtime.retrieval.candidates import CandidateRetriever
from dman_runtime.retrieval.exact import ExactRetriever

if TYPE_CHECKING:
    from dman_runtime.model.sessions import Provider

Answering = State | RecordHead
GOLDEN_TOLERANCE = 1e-3  # relative to the largest value; float32 on another machine or on CUDA stays far below


@dataclass(frozen=True)
class Generation:
    """One model that serves: what the engine is built from, beside a store."""

    bundle: Bundle
    graphs: Graphs
    retriever: Retriever
    _on_device: Finder | None = field(default=None, compare=False, repr=False)
    _kept: KeptAnswers = field(default_factory=KeptAnswers, compare=False, repr=False)

    @classmethod
    def open(
        cls, path: Path, *, provider: Provider = "auto", threads: int = 1, expected_bundle_id: str | None = None
    ) -> Generation:
        """Opens and verifies the bundle at `path`, loads its graphs and repeats its golden replay.

        Args:
            threads: CPU threads inside one graph run.
            expected_bundle_id: The bundle that is served already, if any: another one is refused.

        Raises:
            BundleError, EncoderError
        """
        from dman_runtime.model.encoder import Encoder

        bundle = open_bundle(path, expected_bundle_id=expected_bundle_id)
        encoder = Encoder.of(bundle, provider=provider, threads=threads)
        generation = cls.of(bundle, encoder, on_device=encoder.device_items(bundle))
        generation.check_golden()
        return generation

    @classmethod
    def of(cls, bundle: Bundle, graphs: Graphs, *, on_device: Finder | None = None) -> Generation:
        """With the search that the bundle is made for, or the one on a device, which misses nothing."""
        table, finder = bundle.item_embeddings, on_device or bundle.index
        retriever = ExactRetriever(table) if finder is None else CandidateRetriever(table, finder)
        return cls(bundle, graphs, retriever, on_device)

    def extended(self, slots: Sequence[tuple[str, AddedItem] | None]) -> tuple[Generation, additions.Extended]:
        """A generation as it was opened, with items that were added at run time (`additions.extended`)."""
        more = additions.extended(self.bundle, slots)
        return Generation.of(more.bundle, self.graphs, on_device=self._on_device), more

    def encoding(self, added: np.ndarray) -> Generation:
        """A generation as it was opened, with the embeddings (n, D) of added items: to encode events with, no more."""
        return replace(self, bundle=additions.with_embeddings(self.bundle, added))

    @property
    def bundle_id(self) -> str:
        return self.bundle.bundle_id

    def unpack(self, stored: bytes | None) -> State:
        """The state in a record; that of an empty history for None. Raises StateError."""
        return State.empty(self.bundle) if stored is None else record.unpack(stored, self.bundle)

    def pack(self, state: State) -> bytes:
        return record.pack(state, self.bundle)

    @cached_property
    def answers_anywhere(self) -> bool:
        """Whether any thread may answer: not where an answer runs a graph on CUDA, which has one thread for all."""
        return not (self.graphs.on_cuda and self.bundle.manifest.state.times == "request")

    @cached_property
    def answer_bytes(self) -> int:
        """How much of a record `read_for_answer` takes."""
        shape = self.bundle.manifest.state
        if shape.answers_read_states:
            return record.max_record_bytes(shape) + record.LACKING_BYTES
        return record.head_bytes(shape)

    def read_for_answer(self, stored: bytes) -> Answering:
        """What an answer is made from: of most models the head of a record is enough. Raises StateError."""
        read = record.view if self.bundle.manifest.state.answers_read_states else record.read_head
        return read(stored, self.bundle)

    def asked_before(self, stored: bytes, moment: int | None) -> tuple[RecordHead, PersonalAnswer] | None:
        """The head of a record, and what `asked` gives for it, if that is kept: the state is not read then.

        None if it is not, and for a damaged record. Nothing is kept of a model whose answers are in the head.
        """
        if not self.bundle.manifest.state.answers_read_states:
            return None
        end = record.head_bytes(self.bundle.manifest.state)
        if (last := self._kept.last(head := stored[:end])) is None:
            return None
        answer = self._kept.get(head, recurrence.moment_of(last, moment))
        return None if answer is None else (record.read_head(head, self.bundle), answer)

    def asked(self, users: Sequence[Answering], moments: Sequence[int | None]) -> tuple[np.ndarray, list[Added | None]]:
        """What a search needs of users with events, for requests at these seconds, None for an unknown time.

        Returns:
            (B, D) user embeddings, and what is added to the scores of items that the users had before.
        """
        states = [user for user in users if isinstance(user, State)]
        if len(states) < len(users):  # heads, which is enough: nothing else is in a state that would count
            return _rows([user.user_embedding for user in users]), [None] * len(users)
        asked = [recurrence.moment_of(*one) for one in zip(states, moments, strict=True)]
        answers = [self._kept.get(state.stored, at) for state, at in zip(states, asked, strict=True)]
        if None in answers:
            self._answer(answers, states, asked)
        found = [answer for answer in answers if answer is not None]
        return _rows([answer.embedding for answer in found]), [answer.added for answer in found]

    def _answer(
        self, answers: list[PersonalAnswer | None], states: Sequence[State], moments: Sequence[int | None]
    ) -> None:
        """Fills in, and keeps, the answers that are None."""
        rows = [row for row, answer in enumerate(answers) if answer is None]
        chosen, asked = [states[row] for row in rows], [moments[row] for row in rows]
        embeddings = recurrence.embeddings_at(chosen, asked, bundle=self.bundle, graphs=self.graphs)
        for row, state, embedding, at in zip(rows, chosen, embeddings, asked, strict=True):
            answer = answers[row] = PersonalAnswer(embedding.copy(), self._added(state, embedding, at))
            last = recurrence.Last(state.shape, state.last_time, state.last_is_known)
            self._kept.put(state.stored, at, answer, last)

    def _added(self, state: State, embedding: np.ndarray, at: int | None) -> Added | None:
        """What is added to the scores of items that the user had before; None for a model without that term."""
        if not self.bundle.returns:
            return None
        sketch = state.counts()
        moment = state.last_time if at is None else at
        return Added(sketch.items, return_scores(sketch, embedding, moment, self.bundle.returns))

    def advance(
        self,
        states: Sequence[State],
        new_events: Sequence[KnownEvents],
        rest: Callable[[], None] = recurrence.without_rest,
    ) -> None:
        """Appends `new_events[i]` to `states[i]`, in place. Calls `rest` from time to time."""
        recurrence.advance(states, new_events, bundle=self.bundle, graphs=self.graphs, rest=rest)

    def advance_pieces(self, pieces: Sequence[Piece]) -> None:
        recurrence.advance_pieces(pieces, bundle=self.bundle, graphs=self.graphs)

    def replay(self, histories: Sequence[KnownEvents]) -> list[State]:
        """The states of users with these histories."""
        return recurrence.replay(histories, bundle=self.bundle, graphs=self.graphs)

    def check_golden(self) -> float:
        """Repeats the replay that PyTorch recorded at export, and returns the relative error.

        In float32 and without rounding closed segments: a difference in the last digit could decide to which step a
        value is rounded, and would count as many times as much.

        Raises BundleError when that is above GOLDEN_TOLERANCE, or when the graphs do not run.
        """
        exact = replace(self.bundle.manifest.state, dtype="float32", closed="full")
        bundle = replace(self.bundle, manifest=replace(self.bundle.manifest, state=exact))
        try:
            error = Generation(bundle, self.graphs, self.retriever)._golden_error()
        except Exception as failure:  # of ONNX Runtime, or of numpy over results of a wrong shape
            raise BundleError(
                f"{bundle.path}: the golden replay fails on this machine ({type(failure).__name__})",
                "export the bundle again",
            ) from failure
        if not error <= GOLDEN_TOLERANCE:
            raise self._golden_refusal(error)
        return error

    def _golden_refusal(self, error: float) -> BundleError:
        cause = f"{self.bundle.path}: the golden replay is off by {error:.1e} on this machine"
        remedy = "run the graphs on the CPU, or export the bundle again with this version of ONNX Runtime"
        if not self.bundle.manifest.state.recurrent:  # earlier versions absorbed a segment later
            cause += ", or an earlier version trained it: variant nran had another form"
            remedy = "train again if the bundle is older than this version, else run the graphs on the CPU"
        return BundleError(cause, remedy, parameter="provider")

    def _golden_error(self) -> float:
        golden = self.bundle.golden()
        times = golden.get("times", np.zeros_like(golden["histories"]))
        events = [KnownEvents(row[row >= 0], of[row >= 0]) for row, of in zip(golden["histories"], times, strict=True)]
        states = self.replay(events)
        return max(
            _relative_error(np.stack([state.user_embedding for state in states]), golden["user_embeddings"]),
            _relative_error(np.stack([state.memory for state in states]), golden["memories"]),
        )


def _rows(vectors: list[np.ndarray]) -> np.ndarray:
    """(D) vectors as (B, D); np.stack takes longer than the search where there is one."""
    return vectors[0][None] if len(vectors) == 1 else np.stack(vectors)


def _relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    if found.shape != expected.shape:  # numpy would repeat one value for many
        raise ValueError(f"{found.shape} instead of {expected.shape}")
    if not expected.size:
        return 0.0
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is reported as an error, not as a warning
        return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-12))
