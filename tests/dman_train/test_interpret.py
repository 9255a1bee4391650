"""Short-term share, slot attention and slot diversity against computations by hand, and the options that write them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PAPER, TIMED, TINY, TINY_ITEMS, random_model
from torch import Tensor

from dman_runtime.data.logs import read_interactions
from dman_train import evaluate, train
from dman_train.blocks import Attention
from dman_train.config import ModelConfig
from dman_train.interpret import Observations, observe, slot_diversity, summarise, trajectory
from dman_train.model import DMAN
from dman_train.replay import replay

EXACT = {"rtol": 1e-4, "atol": 2e-5}  # float32, two orders of summation
WITH_MEMORY = {
    "plus": TINY,
    "deep": replace(TINY, heads=4, layers=3),
    "gated": replace(TINY, long_term="gated"),
    "paper": PAPER,
    "fifo": replace(TINY, variant="fifo"),
    "nran": replace(TINY, variant="nran"),
    "paper-nran": replace(PAPER, variant="nran"),
}
every_variant = pytest.mark.parametrize("config", WITH_MEMORY.values(), ids=WITH_MEMORY.keys())
LENGTHS = (23, 4, 5, 10, 1, 11, 15, 16, 40)  # segments have 5 events


def random_histories(*lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(5)
    return [random.integers(0, TINY_ITEMS, length) for length in lengths]


def memory_read(model: DMAN, history: np.ndarray) -> Tensor:
    """(L, m, D): what the last segment reads is what the whole segments before it left."""
    before = (len(history) - 1) // 5 * 5
    return replay(model, [history[:before]])[1][0] if before else model.initial_memory.detach()


# Against other computations


@pytest.mark.slow
@every_variant
@torch.no_grad()
def test_share_and_attention_are_those_of_the_user_embedding(config: ModelConfig) -> None:
    model, histories = random_model(config, TINY_ITEMS), random_histories(*LENGTHS)
    seen, users = observe(model, histories, batch=4), replay(model, histories)[0]
    assert seen.attention.shape == (len(LENGTHS), config.layers, 4)
    np.testing.assert_allclose(seen.attention.sum(-1), 1, rtol=1e-5)
    by_hand = _merged if config.long_term == "merged" else _gated
    for row, history in enumerate(histories):
        user, share, attention = by_hand(model, history)
        torch.testing.assert_close(user * model.output_scale, users[row], **EXACT)
        assert seen.share[row] == pytest.approx(share, rel=1e-4)
        np.testing.assert_allclose(seen.attention[row], attention, **EXACT)


def _merged(model: DMAN, history: np.ndarray) -> tuple[Tensor, float, np.ndarray]:
    """User embedding (D), share of the events in what its position reads, and attention to the slots (L, m)."""
    segments: list[Tensor] = []  # (L, T, D) layer inputs of each
    replay(model, [history], lambda _rows, _memory, encoding: segments.append(encoding.hidden[0]))
    if not model.config.recurrent:
        segments = segments[-1:]
    events, memory = torch.cat(segments[-2:], dim=1), memory_read(model, history)
    distance, shares, attention = torch.arange(events.shape[1]).flip(0), [], []
    for layer, block in enumerate(model.short_term):
        sources = torch.cat([block.norm_memory(memory[layer]), block.norm(events[layer])])
        bias = torch.cat([model.slot_bias[layer], model.distance_bias[layer][:, distance]], dim=1)  # (H, K)
        read, weights = _read(block.attention, block.norm(events[layer, -1]), sources, bias)
        h = block.add(events[layer, -1][None], read[None])[0]
        if layer + 1 < model.config.layers:
            torch.testing.assert_close(events[layer + 1, -1], h, **EXACT)
        shares.append(weights[:, 4:].sum(1))
        attention.append((weights[:, :4] / weights[:, :4].sum(1, keepdim=True)).mean(0))
    return model.norm_short(h), float(torch.stack(shares).mean()), torch.stack(attention).numpy()


def _gated(model: DMAN, history: np.ndarray) -> tuple[Tensor, float, np.ndarray]:
    """As `_merged`. The short-term branch is that of an xl model of the same weights."""
    xl = random_model(replace(model.config, variant="xl"), TINY_ITEMS)
    xl.load_state_dict({name: model.state_dict()[name] for name in xl.state_dict()})
    visible = history if model.config.recurrent else history[(len(history) - 1) // 5 * 5 :]
    short, attention = replay(xl, [visible])[0][0] / model.output_scale, []
    g = model.embed(torch.from_numpy(history[-1:]))[0]
    for block, memory in zip(model.long_term, memory_read(model, history), strict=True):
        read, weights = _read(block.attention, block.norm(g), block.norm_memory(memory))
        g = block.add(g[None], read[None])[0]
        attention.append(weights.mean(0))
    long = model.norm_long(g)
    bias = 0 if model.gate_short.bias is None else model.gate_short.bias  # `paper` has none, as in eq. 3
    gate = 1 / (1 + torch.exp(-(model.gate_short.weight @ short + bias + model.gate_long.weight @ long)))
    return gate * short + (1 - gate) * long, float(gate.mean()), torch.stack(attention).numpy()


def _read(w: Attention, query: Tensor, sources: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What one query (D) reads from (K, D) sources, (D), and its weights (H, K); head by head with projected keys."""
    by_head = (w.query.weight @ query).view(w.heads, w.head_width)
    logits = torch.stack([(sources @ w.key[h].T) @ q / w.head_width**0.5 for h, q in enumerate(by_head)])
    weights = (logits if bias is None else logits + bias).exp()
    weights = weights / weights.sum(1, keepdim=True)
    return w.output(torch.cat([weights[h] @ sources @ w.value[h] for h in range(w.heads)])), weights


@pytest.mark.slow
@every_variant
@torch.no_grad()
def test_diversity_is_that_of_the_memory_read(config: ModelConfig) -> None:
    model, histories = random_model(config, TINY_ITEMS), random_histories(*LENGTHS)
    seen = observe(model, histories, batch=4)
    initial = model.initial_memory
    written = [not torch.equal(memory_read(model, history), initial) for history in histories]
    assert (seen.absorbed > 0).tolist() == written
    for row, history in enumerate(histories):
        for layer, memory in enumerate(memory_read(model, history).double().numpy()):
            norms = np.linalg.norm(memory, axis=1)
            pairs = [memory[i] @ memory[j] / norms[i] / norms[j] for i in range(4) for j in range(i)]
            cosine = np.clip(pairs, -1, 1)  # fifo holds an item twice: 1 and a rounding error
            share = np.linalg.svd(memory, compute_uv=False) / np.linalg.svd(memory, compute_uv=False).sum()
            assert seen.cosine[row, layer] == pytest.approx(np.mean(cosine), abs=1e-4)
            assert seen.near_identical[row, layer] == pytest.approx(np.mean(cosine > 0.95))
            assert seen.effective_rank[row, layer] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-3)
            assert seen.pairs[row, layer].tolist() == np.histogram(cosine, np.linspace(-1, 1, 41))[0].tolist()


@pytest.mark.parametrize(
    ("variant", "absorbed"),
    [
        ("dman", [0, 0, 1, 2, 3, 0, 0, 0, 1]),
        ("fifo", [0, 0, 1, 2, 3, 0, 0, 0, 1]),
        ("nran", [0, 1, 2, 3, 4, 0, 0, 1, 2]),
    ],
)
def test_observations_of_every_segment_are_those_of_the_prefixes(variant: Any, absorbed: list[int]) -> None:
    model, histories = random_model(replace(TINY, variant=variant), TINY_ITEMS), random_histories(23, 5, 11)
    every = observe(model, histories, every_segment=True)
    assert every.history.tolist() == [0] * 5 + [1] + [2] * 3
    assert every.events.tolist() == [5, 10, 15, 20, 23, 5, 5, 10, 11]
    assert every.absorbed.tolist() == absorbed
    prefixes = [histories[row][:end] for row, end in zip(every.history, every.events, strict=True)]
    last = observe(model, prefixes)
    for name in ("events", "absorbed", "share", "attention", "cosine", "effective_rank"):
        np.testing.assert_allclose(getattr(every, name), getattr(last, name), rtol=1e-3, atol=1e-4, err_msg=name)
    found = trajectory(observe(model, histories[:1], every_segment=True))
    assert [segment["events"] for segment in found] == [5, 10, 15, 20, 23]
    assert [segment["short_term_share"] for segment in found] == pytest.approx(every.share[:5].tolist(), rel=1e-4)


def test_observing_leaves_the_model_as_it_was() -> None:
    model, histories = random_model(TINY, TINY_ITEMS).train(), random_histories(23, 5)
    first, second = observe(model, histories), observe(model, histories)
    assert np.array_equal(first.share, second.share), "dropout must be off"
    assert model.training and model.short_term[0].training
    assert not any(module._forward_hooks for module in model.modules())


def test_observations_of_a_model_that_sees_times_are_of_its_own_times() -> None:
    model, histories = random_model(TIMED, TINY_ITEMS), random_histories(*LENGTHS)
    times = [10**9 + np.cumsum(np.random.default_rng(n).geometric(1e-4, n)) for n in LENGTHS]
    together = observe(model, histories, times=times, batch=4)
    for row, (history, moments) in enumerate(zip(histories, times, strict=True)):
        alone = observe(model, [history], times=[moments])
        np.testing.assert_allclose(together.attention[row], alone.attention[0], rtol=1e-4, atol=1e-6)
    at_once = observe(model, histories, times=[np.full(n, 10**9) for n in LENGTHS], batch=4)
    assert np.abs(at_once.attention - together.attention).max() > 1e-3


def test_model_without_memory_cannot_be_observed() -> None:
    with pytest.raises(ValueError, match="without memory"):
        observe(random_model(replace(TINY, variant="xl"), TINY_ITEMS), random_histories(23))


# Cases with an obvious answer


def test_identical_slots_have_cosine_1_and_effective_rank_1() -> None:
    found = slot_diversity(torch.randn(3, 2, 1, 32).repeat(1, 1, 8, 1))
    torch.testing.assert_close(found.cosine, torch.ones(3, 2))
    torch.testing.assert_close(found.near_identical, torch.ones(3, 2))
    torch.testing.assert_close(found.effective_rank, torch.ones(3, 2), rtol=1e-3, atol=0)
    assert (found.pairs[..., -1] == 28).all()


def test_orthogonal_slots_have_cosine_0_and_effective_rank_m() -> None:
    found = slot_diversity(torch.linalg.qr(torch.randn(3, 2, 32, 8)).Q.transpose(-1, -2) * 5)
    torch.testing.assert_close(found.cosine, torch.zeros(3, 2))
    assert not found.near_identical.any()
    torch.testing.assert_close(found.effective_rank, torch.full((3, 2), 8.0))
    assert (found.pairs.sum(-1) == 28).all()


def test_two_identical_slots_among_orthogonal_ones_are_one_near_identical_pair() -> None:
    found = slot_diversity(torch.eye(4)[[0, 1, 2, 2]])
    assert float(found.near_identical) == pytest.approx(1 / 6)
    share = np.array([1, 1, math.sqrt(2)]) / (2 + math.sqrt(2))
    assert float(found.effective_rank) == pytest.approx(math.exp(-(share * np.log(share)).sum()))


def test_degenerate_memories_stay_finite() -> None:
    for memory in (torch.zeros(2, 4, 32), torch.randn(2, 1, 32)):
        assert all(torch.isfinite(value).all() for value in slot_diversity(memory))


def test_identical_slots_are_read_alike() -> None:
    model = random_model(replace(TINY, long_term="gated"), TINY_ITEMS)  # where a slot has no bias of its own
    with torch.no_grad():
        model.initial_memory.copy_(torch.randn(2, 1, 32).expand(2, 4, 32))
    np.testing.assert_allclose(observe(model, random_histories(4)).attention, 0.25, rtol=1e-5)


def observations(events: list[int], share: list[float], attention: list[list[float]]) -> Observations:
    """One layer of two slots, all else the same for everybody."""
    n, one = len(events), np.ones((len(events), 1))
    absorbed = np.maximum((np.array(events) - 1) // 5 - 1, 0)
    weights, pairs = np.array(attention)[:, None], np.zeros((n, 1, 40))
    return Observations(np.arange(n), np.array(events), absorbed, np.array(share), weights, one, one, pairs, one)


def test_summary_equals_a_table_by_hand() -> None:
    events, share = [3, 49, 50, 199, 200, 500, 501], [0.1, 0.3, 0.5, 0.5, 0.6, 0.8, 1.0]
    seen = observations(events, share, [[0.5, 0.5]] * 5 + [[1.0, 0.0]] * 2)
    found = summarise(random_model(replace(TINY, layers=1, memory_slots=2), TINY_ITEMS), seen)
    lengths = [(row["events"], row["users"], row["mean"]) for row in found["short_term_share"]["by_history_length"]]
    expected = [("< 50", 2, 0.2), ("50 to 199", 2, 0.5), ("200 to 499", 1, 0.6), (">= 500", 2, 0.9)]
    assert lengths == [(name, users, pytest.approx(mean)) for name, users, mean in expected]
    assert sum(found["short_term_share"]["histogram"]["fraction"]) == pytest.approx(1)
    (layer,) = found["attention"]
    assert layer["slots"] == pytest.approx([4.5 / 7, 2.5 / 7])
    assert layer["entropy"]["mean"] == pytest.approx(5 / 7)  # in units of log 2
    assert layer["largest_slot"]["mean"] == pytest.approx(4.5 / 7)
    assert found["slot_diversity"]["users"] == 6, "three events write no memory"


# The command


def assert_finite(value: Any) -> None:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            assert_finite(part)
    elif isinstance(value, float):
        assert math.isfinite(value)


def written(directory: Path) -> dict[str, Any]:
    """interpretation.json, after a look at the files beside it."""
    assert not [file for file in directory.iterdir() if file.name.startswith(".")]
    for picture in directory.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads((directory / "interpretation.json").read_text())
    assert_finite(found)
    return found


PICTURES = {"attention.png", "share.png", "slots.png"}


@pytest.mark.slow
def test_evaluate_writes_the_interpretation_of_all_users(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "interpretation"
    assert evaluate.main(["--run", str(trained_run), "--interpret", str(out), "--split", "valid", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = written(out)
    assert {file.name for file in out.iterdir()} == PICTURES | {"interpretation.json"}
    assert found["users"] == metrics["users"] > 50
    assert (found["split"], found["user"], found["memory_slots"]) == ("valid", None, 8)
    assert sum(row["users"] for row in found["short_term_share"]["by_history_length"]) == found["users"]
    assert 0 < found["short_term_share"]["mean"] < 1
    assert [sum(layer["slots"]) for layer in found["attention"]] == pytest.approx([1, 1])
    assert 0 < found["slot_diversity"]["users"] <= found["users"]
    for layer in found["slot_diversity"]["layers"]:
        assert 1 <= layer["effective_rank"]["mean"] <= 8
        assert sum(layer["pairs"]["fraction"]) == pytest.approx(1)


@pytest.mark.slow
def test_evaluate_writes_one_user_with_the_trajectory(
    trained_run: Path, small_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = read_interactions(small_log)
    row = int(np.argmax(np.diff(log.offsets)))
    command = ["--run", str(trained_run), "--interpret", str(tmp_path)]
    assert evaluate.main([*command, "--user", log.user_ids[row]]) == 0
    assert "1 users" in capsys.readouterr().out
    found = written(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == PICTURES | {"interpretation.json", "trajectory.png"}
    assert (found["user"], found["users"]) == (log.user_ids[row], 1)
    segments = found["trajectory"]
    events = segments[-1]["events"]
    assert 0.8 * len(log.history(row)) < events < len(log.history(row)), "all but the held-out and unknown ones"
    assert [segment["events"] for segment in segments] == [*range(10, events, 10), events]
    assert segments[-1]["short_term_share"] == pytest.approx(found["short_term_share"]["mean"])
    assert evaluate.main(command) == 0
    assert "trajectory" not in written(tmp_path) and not (tmp_path / "trajectory.png").exists()


@pytest.mark.slow
def test_evaluate_interprets_a_user_whose_memory_was_never_written(
    trained_run: Path, small_log: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.csv"
    lines = small_log.read_text().splitlines()
    user = lines[1].partition(",")[0]
    short.write_text("\n".join([lines[0], *[line for line in lines if line.startswith(f"{user},")][:6]]) + "\n")
    options = ["--data", str(short), "--min-user-events", "0", "--min-item-events", "0", "--user", user]
    assert evaluate.main(["--run", str(trained_run), "--interpret", str(tmp_path / "out"), *options]) == 0
    found = written(tmp_path / "out")
    assert found["slot_diversity"]["users"] == 0
    assert len(found["slot_diversity"]["initial"]) == 2 and len(found["trajectory"]) == 1


def refusal(capsys: pytest.CaptureFixture[str], *options: str | Path) -> str:
    """The one line of an evaluation that must fail."""
    capsys.readouterr()
    assert evaluate.main([str(option) for option in options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.endswith("\n") and len(err.splitlines()) == 1, err
    return err


def test_evaluate_refuses_an_unknown_user(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert "'nobody' is not in" in refusal(capsys, "--run", trained_run, "--interpret", out, "--user", "nobody")
    assert not out.exists()


def test_evaluate_refuses_a_user_without_a_held_out_event(
    trained_run: Path, small_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.csv"
    _, first, *_ = lines = small_log.read_text().splitlines()
    log.write_text("\n".join([*lines, f"brief,{first.split(',', 1)[1]}"]) + "\n")
    options = ["--data", log, "--min-user-events", "0", "--min-item-events", "0", "--user", "brief"]
    message = refusal(capsys, "--run", trained_run, "--interpret", tmp_path / "out", *options)
    assert "fewer than three events" in message


def test_evaluate_refuses_what_does_not_go_together(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--run" in refusal(capsys, "--bundle", tmp_path, "--interpret", tmp_path)
    assert "--interpret" in refusal(capsys, "--run", trained_run, "--user", "u0001")
    assert "--interpret" in refusal(capsys, "--bundle", tmp_path, "--user", "u0001")


@pytest.mark.slow
@pytest.mark.parametrize("path", ["file", "file/below", "plot"])
def test_evaluate_refuses_a_directory_that_cannot_be_written(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    (tmp_path / "file").write_text("years of work")
    (tmp_path / "plot" / "share.png").mkdir(parents=True)
    message = refusal(capsys, "--run", trained_run, "--interpret", tmp_path / path)
    assert f"{tmp_path / path} cannot be written" in message and "(--interpret)" in message
    assert (tmp_path / "file").read_text() == "years of work"


@pytest.mark.slow
def test_evaluate_refuses_to_interpret_xl(small_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--preset", "tiny", "--epochs", "1", "--lanes", "16", "--threads", "1", "--variant", "xl"]
    assert train.main(["--data", str(small_log), "--run", str(tmp_path / "xl"), *options]) == 0
    out = tmp_path / "out"
    assert "nothing to interpret" in refusal(capsys, "--run", tmp_path / "xl", "--interpret", out)
    assert not out.exists()


def test_evaluate_refuses_to_interpret_weights_that_are_not_finite(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "vocabulary.json", "best.pt"):
        (run / name).write_bytes((trained_run / name).read_bytes())
    weights = torch.load(run / "best.pt")
    weights["slot_bias"][0, 0] = math.nan
    torch.save(weights, run / "best.pt")
    assert "not all finite" in refusal(capsys, "--run", run, "--interpret", tmp_path / "out")
