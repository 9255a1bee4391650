"""Baselines: what an embedding may depend on, and each model against one written event by event."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dman_train.baselines import BASELINES, build
from dman_train.baselines.base import Baseline
from dman_train.baselines.caser import Caser
from dman_train.baselines.gru4rec import GRU4Rec
from dman_train.baselines.hpmn import HPMN, PENALTY, PERIOD
from dman_train.baselines.sasrec import SASRec
from dman_train.baselines.sdm import SDM
from dman_train.baselines.shan import SHAN
from dman_train.baselines.windows import Windows
from dman_train.config import BaselineConfig
from dman_train.lanes import Batch
from dman_train.model import SCORE_SCALE

ITEMS, USERS = 30, 7
LONG = BaselineConfig(history=12, width=16, layers=2, heads=2, dropout=0.2, segment_length=4)
SHORT = replace(LONG, history=4)  # the * form: one segment
CONFIGS = {
    name + mark: replace(form, system=name) for name in BASELINES for mark, form in {"": LONG, "*": SHORT}.items()
}
every_system = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def random_baseline(config: BaselineConfig, *, seed: int = 0) -> Baseline:
    """A model whose every part matters, in double precision: random weights, biases and norms of ordinary size."""
    torch.manual_seed(seed)
    model = build(config, ITEMS, USERS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.double().eval()


def random_window(config: BaselineConfig, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Items of a full window for every user, and the users."""
    items = torch.randint(ITEMS, (USERS, config.history), generator=torch.Generator().manual_seed(seed))
    return items, torch.arange(USERS)


def encode(model: Baseline, items: Tensor, users: Tensor) -> Tensor:
    """Embeddings of rows without padding."""
    return model.encode(items, users, torch.full((len(items),), items.shape[1]))


def mean_loss(model: Baseline, batch: Batch) -> Tensor:
    """The full softmax over the real positions, and the penalty."""
    arrays = (batch.items, batch.targets, batch.users, batch.lengths)
    items, targets, users, lengths = (torch.from_numpy(array) for array in arrays)
    real = torch.arange(items.shape[1]) < lengths[:, None]
    scores = model.encode(items, users, lengths)[real] @ model.item_table().T
    return F.cross_entropy(scores, targets[real]) + model.penalty()


# What every system promises


def test_baselines_are_the_systems_of_the_config() -> None:
    assert tuple(BASELINES) == tuple(sorted(BASELINES, key=get_args(get_type_hints(BaselineConfig)["system"]).index))
    assert set(BASELINES) == set(get_args(get_type_hints(BaselineConfig)["system"]))
    for name, kind in BASELINES.items():
        assert type(build(replace(LONG, system=name), ITEMS, USERS)) is kind


@pytest.mark.slow
@every_system
@torch.no_grad()
def test_baseline_embedding_depends_on_no_later_event(config: BaselineConfig) -> None:
    model, (items, users) = random_baseline(config), random_window(config)
    encoded = encode(model, items, users)
    for end in range(1, config.history):
        other = items.clone()
        other[:, end:] = (other[:, end:] + 7) % ITEMS
        changed = encode(model, other, users)
        torch.testing.assert_close(changed[:, :end], encoded[:, :end], rtol=1e-9, atol=1e-12)
        assert not torch.allclose(changed[:, end], encoded[:, end]), "but on its own"


@every_system
@torch.no_grad()
def test_baseline_embedding_depends_on_no_padding(config: BaselineConfig) -> None:
    model, (items, users) = random_baseline(config), random_window(config)
    lengths = torch.arange(USERS) % config.history + 1
    real = torch.arange(config.history) < lengths[:, None]
    other = torch.where(real, items, (items + 7) % ITEMS)
    encoded, changed = model.encode(items, users, lengths), model.encode(other, users, lengths)
    torch.testing.assert_close(changed[real], encoded[real], rtol=1e-9, atol=1e-12)
    for row, length in enumerate(lengths):
        alone = encode(model, items[row : row + 1, :length], users[row : row + 1])
        torch.testing.assert_close(encoded[row : row + 1, :length], alone, rtol=1e-9, atol=1e-12)


@every_system
@torch.no_grad()
def test_baseline_of_a_prefix_is_the_prefix(config: BaselineConfig) -> None:
    model, (items, users) = random_baseline(config), random_window(config)
    encoded = encode(model, items, users)
    # SDM cuts a window from its end: prefixes that are whole segments shorter are cut at the same places.
    step = config.segment_length if config.system == "sdm" and config.history > config.segment_length else 1
    for end in range(config.history - step, 0, -step):
        torch.testing.assert_close(encode(model, items[:, :end], users), encoded[:, :end], rtol=1e-9, atol=1e-12)


@every_system
@torch.no_grad()
def test_baseline_embeds_ragged_histories_by_their_last_events(config: BaselineConfig) -> None:
    model, random = random_baseline(config), np.random.default_rng(0)
    lengths = [1, 3, 4, 5, config.history - 1, config.history, config.history + 9]
    histories = [random.integers(0, ITEMS, length).astype(np.int32) for length in lengths]
    users = random.permutation(USERS)
    found = model.user_embeddings(histories, users)
    for history, user, row in zip(histories, users, found, strict=True):
        seen = torch.from_numpy(history[-config.history :].astype(np.int64))[None]
        expected = encode(model, seen, torch.tensor([user]))[0, -1]
        torch.testing.assert_close(row, expected, rtol=1e-9, atol=1e-12)
    older = [np.append(random.integers(0, ITEMS, 3), history[-config.history :]) for history in histories[-2:]]
    torch.testing.assert_close(model.user_embeddings(older, users[-2:]), found[-2:], rtol=1e-9, atol=1e-12)


@every_system
def test_baseline_trains_every_parameter(config: BaselineConfig) -> None:
    model = random_baseline(config).train()
    items, users = (x.numpy() for x in random_window(config))
    lengths, starts, first_events = np.full(USERS, config.history), np.ones(USERS, bool), np.zeros(USERS, np.int64)
    times = [np.zeros(items.shape, np.int64)] * 3
    rolled = Batch(items, np.roll(items, 1), lengths, starts, users, first_events, *times)
    mean_loss(model, rolled).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        moves_once = config == CONFIGS["hpmn*"] and name == "layers.1.weight_hh_l0"  # from zeros, at the fourth event
        assert (parameter.grad.abs().max() > 1e-8) != moves_once, name  # rounding gives 1e-17


@every_system
def test_baseline_begins_with_small_scores_as_wide_as_its_table(config: BaselineConfig) -> None:
    torch.manual_seed(0)
    model = build(replace(config, width=128), 500, USERS).eval()
    items, users = random_window(config)
    embeddings, table = encode(model, items, users), model.item_table()
    assert embeddings.shape[:2] == items.shape and table.shape == (500, embeddings.shape[2])
    losses = -torch.log_softmax(embeddings @ table.T, dim=-1)
    # sdm adds what the user attends to onto LayerNormed states, which may double them
    assert losses.mean().item() == pytest.approx(math.log(500), abs=2.0 if config.system == "sdm" else 0.6)
    assert model.penalty() < 0.01


@every_system
@torch.no_grad()
def test_baseline_is_deterministic_without_dropout_only(config: BaselineConfig) -> None:
    model, (items, users) = random_baseline(config), random_window(config)
    assert torch.equal(encode(model, items, users), encode(model, items, users))
    model.train()
    assert not torch.equal(encode(model, items, users), encode(model, items, users))


@every_system
@torch.no_grad()
def test_baseline_uses_the_user_where_it_has_a_user_table(config: BaselineConfig) -> None:
    model, (items, users) = random_baseline(config), random_window(config)
    same = torch.equal(encode(model, items, users)[:, -1], encode(model, items, users.flip(0))[:, -1])
    assert same == (config.system in ("gru4rec", "sasrec", "hpmn"))


@every_system
@torch.no_grad()
def test_baseline_survives_large_energies(config: BaselineConfig) -> None:
    model, (items, users) = random_baseline(config), random_window(config)
    for parameter in model.parameters():
        parameter.mul_(1e3)
    assert torch.isfinite(encode(model, items, users)).all()


@every_system
def test_baseline_trains_in_bfloat16(config: BaselineConfig) -> None:
    model = random_baseline(config).float().train()
    batch = next(windows_of(walks(), length=config.history, positions=100))
    with torch.autocast("cpu", torch.bfloat16):
        loss = mean_loss(model, batch)
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def windows_of(histories: list[np.ndarray], *, length: int, positions: int = 300, seed: int = 0) -> Windows:
    offsets = np.concatenate([[0], np.cumsum([len(history) for history in histories])]).astype(np.int64)
    items = np.concatenate(histories).astype(np.int32)
    times = np.zeros(len(items), np.int64)
    return Windows(items, offsets, times, length=length, positions=positions, seed=seed)


RING = np.random.default_rng(0).permutation(ITEMS)


def walks(*, seed: int = 0) -> list[np.ndarray]:
    """Histories in which nine of ten events are the next one of `RING`, and the others any."""
    random = np.random.default_rng(seed)
    steps = np.where(random.random((USERS, 200)) < 0.9, 1, random.integers(0, ITEMS, (USERS, 200)))
    return list(RING[np.cumsum(steps, axis=1) % ITEMS])


@pytest.mark.slow
@every_system
def test_baseline_learns_what_follows_an_item(config: BaselineConfig) -> None:
    torch.manual_seed(0)
    model, schedule = build(replace(config, width=32), ITEMS, USERS), windows_of(walks(), length=config.history)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimiser.zero_grad()
        mean_loss(model, next(schedule)).backward()
        optimiser.step()
    unseen = next(windows_of(walks(seed=1), length=config.history, positions=2000, seed=1))
    chance = math.log(ITEMS)  # 3.4; a model that knew the ring would have 0.64
    limit = 0.8 if config.system == "shan" else 0.5  # SHAN sees what came before, not in which order
    assert mean_loss(model.eval(), unseen) < limit * chance


# Each model against one that is written position by position


def cell_of(cell: type[nn.GRUCell] | type[nn.LSTMCell], layers: nn.GRU | nn.LSTM, layer: int = 0) -> nn.Module:
    """One step of a layer, with its weights."""
    step = cell(layers.input_size, layers.hidden_size).double()
    step.load_state_dict(
        {name.removesuffix(f"_l{layer}"): w for name, w in layers.state_dict().items() if f"_l{layer}" in name}
    )
    return step


def row_of(config: BaselineConfig, user: int = 3) -> tuple[Tensor, Tensor]:
    """One full window of one user."""
    items, users = random_window(config)
    return items[user : user + 1], users[user : user + 1]


def assert_encodes(model: Baseline, items: Tensor, users: Tensor, expected: list[Tensor]) -> None:
    torch.testing.assert_close(encode(model, items, users)[0], torch.stack(expected), rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_gru4rec_equals_cells_stepped_event_by_event() -> None:
    model = random_baseline(CONFIGS["gru4rec"])
    assert isinstance(model, GRU4Rec)
    (items, users), cells = row_of(model.config), [cell_of(nn.GRUCell, model.gru, layer) for layer in range(2)]
    first = second = torch.zeros(1, 16, dtype=torch.double)
    expected = []
    for item in items[0]:
        first = cells[0](model.items[item][None] * 4, first)  # 4 = sqrt(D)
        second = cells[1](first, second)
        expected.append(second[0])
    assert_encodes(model, items, users, expected)


@torch.no_grad()
def test_sasrec_first_block_equals_attention_head_by_head() -> None:
    model = random_baseline(replace(CONFIGS["sasrec"], layers=1))
    assert isinstance(model, SASRec)
    (items, users), block = row_of(model.config), model.blocks[0]
    x = (model.items[items[0]] + model.positions) * 4
    q, k, v = block.project(block.norm_attention(x)).view(12, 3, 2, 8).unbind(1)  # (W, H, D/H)
    expected = []
    for t in range(12):
        read = []
        for head in range(2):
            weights = torch.softmax(k[: t + 1, head] @ q[t, head] / math.sqrt(8), 0)
            read.append(weights @ v[: t + 1, head])
        y = x[t] + block.output(torch.cat(read))
        expected.append(model.norm(y + block.ffn(block.norm_ffn(y))) * SCORE_SCALE / 4)
    assert_encodes(model, items, users, expected)


@torch.no_grad()
def test_caser_equals_filters_slid_over_the_image_of_each_event() -> None:
    model = random_baseline(CONFIGS["caser"])
    assert isinstance(model, Caser)
    (items, users), heights = row_of(model.config), model.heights
    assert heights == [1, 2, 3, 4, 5, 8, 12], "all that fit into 12 events"
    events, zeros = model.items[items[0]] * 4, torch.zeros(12, 16, dtype=torch.double)
    expected = []
    for t in range(12):
        image = events[: t + 1]  # the event itself in the last row
        newest_first = torch.cat([image.flip(0), zeros])[:12]
        responses = [w @ newest_first + b for w, b in zip(model.vertical, model.vertical_bias, strict=True)]
        best = []
        for height, convolution in zip(heights, model.horizontal, strict=True):
            padded = torch.cat([zeros[: height - 1], image])
            for weights, bias in zip(*convolution.parameters(), strict=True):  # (D, height)
                slid = [(weights.T * padded[top : top + height]).sum() + bias for top in range(t + 1)]
                best.append(torch.stack(slid).relu().max())
        z = model.mix(torch.cat([*responses, torch.stack(best)])).relu()
        expected.append(torch.cat([z / 4, model.user_table[users[0]], torch.ones(1, dtype=torch.double)]))
    assert_encodes(model, items, users, expected)


def changed_at(model: Baseline, back: int, *, length: int) -> bool:
    """Whether another event `back` events before the last of `length` changes the embeddings of users."""
    histories = np.random.default_rng(0).integers(0, ITEMS, (USERS, length))
    others, users = histories.copy(), np.arange(USERS)
    others[:, -1 - back] = (others[:, -1 - back] + 7) % ITEMS
    found, changed = (model.user_embeddings(list(rows), users) for rows in (histories, others))
    return not torch.allclose(found, changed)


@pytest.mark.parametrize("form, seen", [(200, True), (20, False)])
def test_caser_sees_an_event_100_back_in_its_whole_form_only(form: int, seen: bool) -> None:
    model = random_baseline(replace(CONFIGS["caser"], history=form))
    assert changed_at(model, 19, length=250)
    assert changed_at(model, 100, length=250) == seen
    assert not changed_at(model, 200, length=250)


@torch.no_grad()
def test_caser_vertical_filters_begin_as_means_that_favour_recent_events() -> None:
    model = build(replace(CONFIGS["caser"], history=200), ITEMS, USERS)
    assert isinstance(model, Caser)
    torch.testing.assert_close(model.vertical.sum(1), torch.ones(4))
    assert (model.vertical.diff(dim=1) <= 0).all() and (model.vertical > 0).any(0)[:150].all()
    ages = (model.vertical * torch.arange(200)).sum(1)
    assert ages[0] < 1 and ages[3] > 30 and (ages.diff() > 0).all()


@torch.no_grad()
def test_caser_scores_by_weights_and_a_bias() -> None:
    model = build(CONFIGS["caser"], ITEMS, USERS).eval()
    embeddings, table = encode(model, *random_window(model.config)), model.item_table()
    assert (embeddings[..., -1] == 1).all() and (table[:, -1] == 0).all() and table.shape[1] == 2 * 16 + 1


@pytest.mark.parametrize("name", ["shan", "shan*"])
@torch.no_grad()
def test_shan_equals_its_equations_at_each_event(name: str) -> None:
    model = random_baseline(CONFIGS[name])
    assert isinstance(model, SHAN)
    items, users = row_of(model.config)
    x, user = model.items[items[0]] * 4, model.user_table[users[0]] * 4

    def pool(layer: nn.Linear, candidates: Tensor) -> Tensor:
        return torch.softmax(torch.stack([user @ layer(c).relu() for c in candidates]), 0) @ candidates

    expected = []
    for t in range(len(x)):
        start = max(0, t - 3)  # of the last four events
        candidates = x[start : t + 1]
        if start > 0:
            assert model.long_term is not None
            candidates = torch.cat([pool(model.long_term, x[:start])[None], candidates])
        expected.append(pool(model.short_term, candidates))
    assert_encodes(model, items, users, expected)


@torch.no_grad()
def test_shan_does_not_know_the_order_of_a_segment() -> None:
    model = random_baseline(CONFIGS["shan"])
    items, users = random_window(model.config)
    turned = torch.cat([items[:, :8], items[:, 8:].flip(1)], dim=1)
    torch.testing.assert_close(encode(model, turned, users)[:, -1], encode(model, items, users)[:, -1])


@pytest.mark.parametrize("length", [9, 10, 11, 12, 15])
@pytest.mark.parametrize("name", ["shan", "sdm"])
def test_current_session_of_a_long_history_is_full_whatever_its_length(name: str, length: int) -> None:
    model, (histories, users) = random_baseline(CONFIGS[name]), random_window(replace(LONG, history=length))

    def embeddings_with(events: list[int]) -> Tensor:
        """With the events at these distances from the last one in each other's place."""
        swapped, places = histories.clone(), [length - 1 - back for back in events]
        swapped[:, places] = histories[:, places[::-1]]
        return model.user_embeddings(list(swapped.numpy()), users.numpy())

    before = embeddings_with([])
    # The order matters between the two parts, in SDM's session too, but not among what came before it.
    assert torch.allclose(embeddings_with([4, 5]), before) and torch.allclose(embeddings_with([4, 8]), before)
    assert not torch.allclose(embeddings_with([3, 4]), before) and not torch.allclose(embeddings_with([0, 4]), before)
    assert torch.allclose(embeddings_with([0, 3]), before) == (name == "shan")
    assert torch.allclose(embeddings_with([2, 3]), before) == (name == "shan")


@torch.no_grad()
def test_hpmn_equals_cells_that_move_once_a_period_and_hold() -> None:
    model = random_baseline(replace(CONFIGS["hpmn"], history=40, layers=3))
    assert isinstance(model, HPMN) and PERIOD == 4
    items, users = row_of(model.config)
    x, cells = model.items[items[0]] * 4, [cell_of(nn.GRUCell, layer) for layer in model.layers]
    slots, expected, norms = [torch.zeros(1, 16, dtype=torch.double)] * 3, [], []
    for t, event in enumerate(x, start=1):
        for layer, cell in enumerate(cells):
            if t % 4**layer == 0:
                slots[layer] = cell(event[None] if layer == 0 else slots[layer - 1], slots[layer])
        memory = torch.cat(slots)
        query = model.query(event)
        for _ in range(3):
            weights = torch.softmax(torch.cat([model.energy(torch.cat([query, m, query * m])) for m in memory]), 0)
            query = model.carry(query) + weights @ memory
        expected.append(model.output(torch.cat([query, event])))
        covariance = torch.cov(memory, correction=0)
        norms.append((covariance - covariance.diag().diag()).square().sum().sqrt())
    assert_encodes(model, items, users, expected)
    assert slots[2].any(), "the third layer moved"
    torch.testing.assert_close(model.penalty(), PENALTY * torch.stack(norms).mean())


@torch.no_grad()
def test_hpmn_has_slots_that_move_every_1_4_16_and_64_events() -> None:
    model = random_baseline(replace(CONFIGS["hpmn"], history=200, layers=4))
    assert isinstance(model, HPMN) and model.periods == [1, 4, 16, 64]
    memory = model._memory(model.embed(row_of(model.config)[0]))[0]  # (W, K, D)
    before = F.pad(memory, (0, 0, 0, 0, 1, 0))[:-1]
    for slot, period in enumerate(model.periods):
        moved = (memory[:, slot] != before[:, slot]).any(1)
        assert (moved.nonzero()[:, 0] + 1).tolist() == list(range(period, 201, period))


@pytest.mark.parametrize("layers, reaches", [(1, False), (4, True)])
def test_hpmn_old_event_reaches_the_embedding_through_slow_slots(layers: int, reaches: bool) -> None:
    model = random_baseline(replace(CONFIGS["hpmn"], history=200, layers=layers))
    assert changed_at(model, 150, length=200) == reaches


@torch.no_grad()
def test_hpmn_reads_as_often_as_there_are_hops() -> None:
    models = [random_baseline(replace(CONFIGS["hpmn"], hops=hops)) for hops in (1, 2, 3)]
    assert all(same_weights(models[0], model) for model in models)
    once, twice, thrice = (encode(model, *random_window(model.config)) for model in models)
    assert not torch.allclose(once, twice) and not torch.allclose(twice, thrice)


def same_weights(one: Baseline, other: Baseline) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_hpmn_leaves_out_layers_that_would_never_move() -> None:
    model = build(replace(CONFIGS["hpmn"], history=20, layers=5), ITEMS, USERS)
    assert isinstance(model, HPMN) and model.periods == [1, 4, 16]


@pytest.mark.parametrize("name", ["sdm", "sdm*"])
@torch.no_grad()
def test_sdm_equals_its_parts_at_each_event(name: str) -> None:
    model = random_baseline(CONFIGS[name])
    assert isinstance(model, SDM)
    items, users = row_of(model.config)
    items = items[:, :10]
    x, user, cell = model.items[items[0]] * 4, model.user_table[users[0]] * 4, cell_of(nn.LSTMCell, model.lstm)

    def pool(query: Tensor, values: Tensor) -> Tensor:
        return torch.softmax(values @ query / 4, 0) @ values

    expected = []
    first = 4 if name == "sdm*" else 2  # events of the first segment: the window has 4, or 10
    for t in range(len(x)):
        start = (t - first) // 4 * 4 + first if t >= first else 0
        states, carried = [], None
        for event in x[start : t + 1]:
            carried = cell(event[None], carried)
            states.append(carried[0][0])
        attended = torch.stack([_self_attended(model, torch.stack(states[:end])) for end in range(1, len(states) + 1)])
        mixed = attended[-1] + pool(torch.tanh(model.query(user)), attended)
        if model.gate is not None and model.long_output is not None:
            pooled = pool(user, x[:start]) if start else torch.zeros(16, dtype=torch.double)
            long = torch.tanh(model.long_output(pooled))
            gate = torch.sigmoid(model.gate(torch.cat([mixed, long, user])))
            mixed = gate * mixed + (1 - gate) * long
        expected.append(mixed * SCORE_SCALE / 4)
    assert_encodes(model, items, users, expected)


def _self_attended(model: SDM, states: Tensor) -> Tensor:
    """(T, D) states -> (D) the last of them after its attention to all."""
    q, k, v = model.project(states).view(-1, 3, 2, 8).unbind(1)
    read = [torch.softmax(k[:, head] @ q[-1, head] / math.sqrt(8), 0) @ v[:, head] for head in range(2)]
    return model.norm(states[-1] + model.attended(torch.cat(read)))
