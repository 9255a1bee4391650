"""The figures of the paper's Tables 2 to 5, as printed, and which of our logs stand in for its data sets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Log:
    """A log of ours, and the data set of the paper that it stands in for, if there is one (Table 2)."""

    name: str  # in the records
    paper: str = ""  # the paper's name of its data set
    users: int = 0  # the paper's
    items: int = 0  # the paper's
    segment_length: int = 20  # T
    repeats: bool = True  # whether users come back to items
    about: str = ""


ML_1M = Log("ml-1m", "MovieLens", 6_040, 3_952, repeats=False, about="the same data")
TAOBAO = Log(
    "taobao-userbehavior-sample", "Taobao", 987_994, 4_162_024,
    about="stand-in: the first 0.08 % of the same file, with categories as items",
)  # fmt: skip
WIKIPEDIA = Log("wikipedia-edits", "JD.com", 1_608_707, 378_457, about="stand-in: editors and the pages they edit")
RETAIL = Log(
    "online-retail-long", "XLong", 20_000, 3_269_017, segment_length=50,
    about="stand-in: customers of a web shop with at least 200 events",
)  # fmt: skip
PLANTED = Log("planted", about="generated: a puzzle that only a long memory can solve")
LOGS = (ML_1M, TAOBAO, WIKIPEDIA, RETAIL, PLANTED)

SYSTEMS = ("GRU4Rec*", "Caser*", "SASRec*", "GRU4Rec", "Caser", "SASRec", "SHAN", "HPMN", "SDM", "DMAN")
STARRED = ("gru4rec", "caser", "sasrec")  # have a `*` form, which sees the latest segment only
VARIANTS = {"dman": "DMAN", "xl": "DMAN-XL", "fifo": "DMAN-FIFO", "nran": "DMAN-NRAN"}
# What is above what in Table 5, on both data sets
ORDER = (("DMAN", "DMAN-FIFO"), ("DMAN", "DMAN-NRAN"), ("DMAN-FIFO", "DMAN-XL"), ("DMAN-NRAN", "DMAN-XL"))

Figures = dict[str, tuple[float, ...]]  # by system: a number for each metric of a table


@dataclass(frozen=True)
class Comparison:
    """A table of our page: one log, its metrics, and the paper's figures for them, if it has some."""

    log: Log
    metrics: tuple[str, ...]
    figures: Figures


# MovieLens HR@10, HR@50, NDCG@100; Taobao HR@50, HR@100, NDCG@100; JD.com HR@10, HR@50, NDCG@100; all in percent
_PERCENT: Figures = {
    "GRU4Rec*": (17.69, 43.13, 16.90, 10.42, 14.01, 4.23, 27.65, 38.73, 23.40),
    "Caser*": (18.98, 45.64, 17.62, 13.71, 16.51, 6.89, 29.27, 40.16, 24.25),
    "SASRec*": (21.02, 47.28, 19.05, 16.41, 22.83, 9.23, 33.98, 44.89, 27.41),
    "GRU4Rec": (19.78, 47.40, 18.75, 13.48, 16.53, 5.81, 35.28, 47.52, 27.64),
    "Caser": (20.80, 48.12, 19.28, 15.55, 17.91, 7.35, 36.76, 49.13, 28.35),
    "SASRec": (22.96, 50.09, 20.36, 20.47, 24.48, 9.84, 38.99, 52.64, 31.32),
    "SHAN": (21.34, 49.52, 19.55, 18.87, 21.94, 8.73, 37.72, 50.55, 29.80),
    "HPMN": (22.84, 50.54, 19.77, 19.98, 24.37, 9.66, 39.14, 53.22, 32.24),
    "SDM": (23.42, 51.26, 20.44, 21.66, 25.42, 10.22, 40.68, 55.30, 34.82),
    "DMAN": (25.18, 53.24, 22.03, 24.92, 29.37, 11.13, 44.58, 58.82, 36.93),
}


def _of_table_3(first: int) -> Figures:
    return {name: tuple(value / 100 for value in values[first : first + 3]) for name, values in _PERCENT.items()}


TABLE_3 = (
    Comparison(ML_1M, ("hr@10", "hr@50", "ndcg@100"), _of_table_3(0)),
    Comparison(TAOBAO, ("hr@50", "hr@100", "ndcg@100"), _of_table_3(3)),
    Comparison(WIKIPEDIA, ("hr@10", "hr@50", "ndcg@100"), _of_table_3(6)),
)
_LONG_LOGS = ("hr@200", "hr@500", "hr@100")
TABLE_4 = (
    Comparison(
        RETAIL,
        _LONG_LOGS,
        {
            "GRU4Rec*": (0.079, 0.098),
            "Caser*": (0.084, 0.105),
            "SASRec*": (0.105, 0.123),
            "GRU4Rec": (0.046, 0.063),
            "Caser": (0.023, 0.041),
            "SASRec": (0.061, 0.096),
            "SHAN": (0.091, 0.115),
            "HPMN": (0.118, 0.136),
            "SDM": (0.107, 0.129),
            "DMAN": (0.132, 0.163),
        },
    ),
    Comparison(TAOBAO, _LONG_LOGS, {}),
    Comparison(WIKIPEDIA, _LONG_LOGS, {}),
)
_ABLATION = ("hr@100", "ndcg@100")
TABLE_5 = (
    Comparison(
        TAOBAO,
        _ABLATION,
        {
            "DMAN-XL": (0.237, 0.094),
            "DMAN-FIFO": (0.263, 0.108),
            "DMAN-NRAN": (0.257, 0.104),
            "DMAN": (0.293, 0.111),
        },
    ),
    Comparison(
        RETAIL,
        _ABLATION,
        {
            "DMAN-XL": (0.021, 0.013),
            "DMAN-FIFO": (0.036, 0.017),
            "DMAN-NRAN": (0.043, 0.019),
            "DMAN": (0.054, 0.022),
        },
    ),
    Comparison(ML_1M, _ABLATION, {}),
    Comparison(WIKIPEDIA, _ABLATION, {}),
    Comparison(PLANTED, ("hr@10",), {}),
)
# Figure 2 (a) and (b): the sizes of the model on MovieLens; (c) is the learning curve on Taobao
FIGURE_2 = {"memory_slots": ("m", (2, 4, 6, 8, 10, 20, 30)), "layers": ("L", (1, 2, 3, 4, 5))}
