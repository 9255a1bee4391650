"""Measures what new items are worth that a bundle predicts from their attributes, and writes reports/cold.md.

    python -m tools.cold --data LOG --prepare LOG2      # LOG without the events of 5 % of its items
    python -m dman_train.train --data LOG --run RUN     # both with the same options
    python -m dman_train.train --data LOG2 --run RUN2
    python -m tools.cold --run-all RUN --run-held-out RUN2 --items ITEMS

The new items are those that RUN knows and RUN2 does not. RUN2 is exported as it would be for a server, with the map
from titles and attributes that export fits; the new items are added to the bundle by their titles and attributes alone.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dman_runtime.data.added_items import AddedItem
from dman_runtime.data.evaluation import HeldOut, Split, held_out, metrics, ranks_of_targets
from dman_runtime.data.interactions import Interactions, ItemInfo
from dman_runtime.data.items import read_items
from dman_runtime.errors import InputError, UsageError
from dman_runtime.jobs.evaluating import held_out_ranks
from dman_runtime.model.generation import Generation
from dman_runtime.options import Parser, configure_logging, print_json, run_command
from dman_train.config import DataConfig
from dman_train.data import load
from dman_train.export import export_bundle, validation_audience
from dman_train.model import DMAN
from dman_train.predictor import fit_predictor
from dman_train.ranking import all_ranks
from dman_train.run import Run, open_run
from tools.bench.report import table, write_page

REPORT = Path("reports/cold.md")
SPLITS: tuple[Split, ...] = ("valid", "test")
GOAL = 0.25  # of the HR@10 of the same items when trained
OTHER_USERS = 1500  # drawn at random for what the new items cost the others
HOW_TO_READ = """\
Written by `python -m tools.cold`. {new:,} of {items:,} items, drawn at random with a fixed seed and not by \
popularity, were held out: their {events:,} events were removed from the log before training. The model was \
then exported, and the items were added to the bundle by their titles and attributes alone, as `dman-runtime \
add-items` does.

**Protocol.** Leave-one-out, as in the other reports; here only the users whose target is a new item. All items are \
ranked, the new ones among them, and those that the user has already seen are left out. Events of new items in the \
histories are encoded with their predicted embeddings. "Trained" is the model that was trained on the whole log with \
the same options, for the same users and targets. ± is the standard error over the users.

**Popularity** ranks by the number of events in the training part of the *whole* log, which nobody knows of a new \
item: it is an upper limit for a popularity prior. A prior that knows only the log of the training has no hit at all.
"""


class Held(NamedTuple):
    """What is measured on: the users of a split whose target is a new item, and others."""

    new: HeldOut
    other: HeldOut


def parser() -> Parser:
    p = Parser(prog="python -m tools.cold", description="What new items are worth that are predicted from attributes.")
    p.flag("--data", type=Path, default=None, help="with --prepare: the whole log, a Parquet file")
    p.flag("--prepare", type=Path, default=None, help="write the log without the held-out items here, and stop")
    p.flag("--share", type=float, default=0.05, help="of the items with enough events that are held out")
    p.flag("--seed", type=int, default=0, help="of the draw")
    p.flag("--run-all", type=Path, default=None, help="run that was trained on the whole log")
    p.flag("--run-held-out", type=Path, default=None, help="run that was trained on the log of --prepare")
    p.flag("--items", type=Path, default=None, help="item file with titles and attributes")
    p.flag("--report", type=Path, default=REPORT, help="page to write")
    p.add_argument("--json", action="store_true", help="print the result as JSON on the last line")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    arguments = parser().parse_args(argv)
    configure_logging()
    if arguments.prepare is not None:
        if arguments.data is None:
            raise UsageError("the log is missing", "give it", parameter="data")
        prepare(arguments.data, arguments.prepare, share=arguments.share, seed=arguments.seed)
        return 0
    for name in ("run_all", "run_held_out", "items"):
        if getattr(arguments, name) is None:
            raise UsageError(f"--{name.replace('_', '-')} is missing", "give it, or prepare a log", parameter=name)
    result = measure(open_run(arguments.run_all), open_run(arguments.run_held_out), arguments.items)
    write_page(arguments.report, page(result))
    print(f"{arguments.report} is written")
    if arguments.json:
        print_json(result)
    return 0


def prepare(log: Path, out: Path, *, share: float, seed: int) -> None:
    """Writes a Parquet log without the events of a share of the items that training would keep. Raises InputError."""
    config = DataConfig()
    item_ids = sorted(load(log, config).item_ids)
    count = round(share * len(item_ids))
    if not 0 < count < len(item_ids):
        raise UsageError(
            f"a share of {share} holds out {count} of {len(item_ids)} items", "choose another", parameter="share"
        )
    drawn = {item_ids[place] for place in np.random.default_rng(seed).choice(len(item_ids), count, replace=False)}
    rows = pq.read_table(log)
    column = config.item_column if config.item_column in rows.column_names else "item_id"
    if column not in rows.column_names:
        raise InputError(f"{log} has no column item_id", "rename the column that holds the items")
    kept = [str(item) not in drawn for item in rows[column].to_pylist()]
    pq.write_table(rows.filter(pa.array(kept)), out, compression="zstd")
    print(f"{count} of {len(item_ids)} items and {len(kept) - sum(kept):,} of {len(kept):,} events held out: {out}")


def measure(whole: Run, partial: Run, items: Path) -> dict[str, Any]:
    """Everything that the page says."""
    all_ids, known = whole.vocabulary().item_ids, set(partial.vocabulary().item_ids)
    new_ids = [item_id for item_id in all_ids if item_id not in known]
    if not new_ids or not known <= set(all_ids):
        raise UsageError(
            "the two runs are not of a whole log and of the same log without some items",
            "train the second on what --prepare wrote",
            parameter="run_held_out",
        )
    interactions = load(Path(whole.config["dataset"]["path"]), whole.data_config())
    held = {split: _held(interactions, split, set(new_ids)) for split in SPLITS}
    result: dict[str, Any] = {
        "new": len(new_ids),
        "items": len(all_ids),
        "events": int(np.isin(interactions.items, _places(interactions, new_ids)).sum()),
        "epochs": [len(run.epochs()) for run in (whole, partial)],
        "data": Path(whole.config["dataset"]["path"]).name,
    }
    rows = {split: _trained(whole, interactions, held[split]) for split in SPLITS}
    with tempfile.TemporaryDirectory() as scratch:
        generation, result["quality"] = _exported(partial, items, Path(scratch) / "bundle")
        infos, nothing = read_items(items), ItemInfo("", {})
        found = {item_id: infos.get(item_id, nothing) for item_id in new_ids}
        described = {item_id: AddedItem(info.title, info.attributes) for item_id, info in found.items()}
        added, more = generation.extended(list(described.items()))
        result["unusable"] = len(more.unusable)
        scale = result["quality"]["scale"]
        vectors = {item_id: added.bundle.item_embeddings[place] for item_id, place in _index(added, new_ids).items()}
        mean = generation.bundle.item_embeddings.mean(axis=0)
        variants = {
            "predicted from title and attributes": added,
            "the same without the scale": _with(generation, {i: v / scale for i, v in vectors.items()}),
            "the mean of all items, for each new one": _with(generation, dict.fromkeys(new_ids, mean)),
        }
        for split in SPLITS:
            for name, one in variants.items():
                rows[split][name] = _hits(_ranks(one, interactions, held[split].new))
        before, after = (_hits(_ranks(one, interactions, held["test"].other)) for one in (generation, added))
    result["rows"] = rows
    result["others"] = {"before": before, "after": after}
    return result


def _held(interactions: Interactions, split: Split, new_ids: set[str]) -> Held:
    data = held_out(interactions, split)
    is_new = np.isin(data.targets, _places(interactions, new_ids))
    others = np.random.default_rng(0).permutation(np.flatnonzero(~is_new))[:OTHER_USERS]
    return Held(data.rows(np.flatnonzero(is_new)), data.rows(np.sort(others)))


def _places(interactions: Interactions, item_ids: Sequence[str] | set[str]) -> np.ndarray:
    wanted = set(item_ids)
    return np.array([place for place, item_id in enumerate(interactions.item_ids) if item_id in wanted], np.int64)


def _trained(run: Run, interactions: Interactions, held: Held) -> dict[str, Any]:
    """The model that knows all items, and popularity."""
    vocabulary = run.vocabulary()
    index = {item_id: place for place, item_id in enumerate(vocabulary.item_ids)}
    data = held.new.in_terms_of(np.array([index[item_id] for item_id in interactions.item_ids]))
    trained = all_ranks(run.best_model(), data).seen_excluded
    scores = np.broadcast_to(vocabulary.counts.astype(np.float64), (len(data.targets), len(index)))
    popular = ranks_of_targets(scores, data.targets, data.histories).seen_excluded
    return {"trained": _hits(trained), "popularity, as if it were known": _hits(popular)}


def _exported(run: Run, items: Path, path: Path) -> tuple[Generation, dict[str, Any]]:
    """The run as a server would have it, and what its manifest says of new items."""
    model, vocabulary = cast(DMAN, run.best_model()), replace(run.vocabulary(), items=read_items(items))
    audience = validation_audience(run, model, vocabulary)
    fitted = fit_predictor(model.item_table().detach().numpy(), vocabulary, audience) if audience else None
    if fitted is None:
        raise UsageError("too few items have titles or attributes", "give a file with more", parameter="items")
    export_bundle(model, vocabulary, path, fitted=fitted)
    return Generation.open(path, provider="cpu"), fitted.quality


def _index(generation: Generation, item_ids: Sequence[str]) -> dict[str, int]:
    index = generation.bundle.items.index
    return {item_id: index[item_id] for item_id in item_ids if item_id in index}


def _with(generation: Generation, vectors: Mapping[str, np.ndarray]) -> Generation:
    added = [(i, AddedItem(embedding=vector, bundle_id=generation.bundle_id)) for i, vector in vectors.items()]
    return generation.extended(added)[0]


def _ranks(generation: Generation, interactions: Interactions, data: HeldOut) -> np.ndarray:
    index = generation.bundle.items.index
    places = np.array([index.get(item_id, -1) for item_id in interactions.item_ids])
    return held_out_ranks(data.in_terms_of(places), generation).seen_excluded


def _hits(ranks: np.ndarray) -> dict[str, float]:
    found = metrics(ranks)
    error = float(np.sqrt(found["hr@10"] * (1 - found["hr@10"]) / len(ranks)))
    return {"users": len(ranks), "error": error} | {name: found[name] for name in ("hr@10", "ndcg@10", "hr@50")}


# -- the page --------------------------------------------------------------------------------------------------------


def page(result: Mapping[str, Any]) -> list[str]:
    """The paragraphs and tables."""
    parts = ["# New items, predicted from their attributes", HOW_TO_READ.format(**result).strip()]
    test = result["rows"]["test"]
    share = test["predicted from title and attributes"]["hr@10"] / max(test["trained"]["hr@10"], 1e-9)
    verdict = "reached" if share >= GOAL else "missed"
    parts.append(
        f"**Result.** On the test targets, new items that were never trained get {share:.0%} of the HR@10 of the same "
        f"items when trained (goal: at least {GOAL:.0%}, {verdict}). Epochs trained: {result['epochs'][0]} with the "
        f"whole log, {result['epochs'][1]} without the new items."
    )
    for split, title in (("test", "Test"), ("valid", "Validation")):
        rows = result["rows"][split]
        users = rows["trained"]["users"]
        parts += [f"## {title}: {users:,} users whose target is a new item", _table(rows)]
    before, after = result["others"]["before"], result["others"]["after"]
    cost = (
        f"HR@10 of {before['users']:,} other users, whose test target is an item of the training: "
        f"{before['hr@10']:.4f} without the new items in the catalogue, {after['hr@10']:.4f} with them."
    )
    manifest = (
        "Measured at export on the items of the training, each held out in turn, with validation users "
        "([formats](../docs/formats.md#new-items)):"
    )
    unusable = f"New items that the bundle could not serve: {result['unusable']}."
    fields = [[f"`{name}`", f"{value:.4g}"] for name, value in result["quality"].items()]
    parts += ["## What the new items cost the others", cost, "## What the manifest says", manifest]
    parts += [table(("field", "value"), fields), unusable]
    return parts


def _table(rows: Mapping[str, Mapping[str, float]]) -> str:
    trained = rows["trained"]["hr@10"]
    lines = [
        [
            name,
            f"{row['hr@10']:.4f} ± {row['error']:.4f}",
            f"{row['hr@10'] / max(trained, 1e-9):.0%}",
            f"{row['ndcg@10']:.4f}",
            f"{row['hr@50']:.4f}",
        ]
        for name, row in rows.items()
    ]
    return table(("new items are", "HR@10", "of trained", "NDCG@10", "HR@50"), lines)


if __name__ == "__main__":
    sys.exit(main())
