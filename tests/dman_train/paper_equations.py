"""The equations of the paper, written out: what architecture "paper" is compared with.

Written from the paper's text, not from the product: one user, one position, one slot at a time. Slow on purpose.
Tensors serve as float64 numbers and for their gradients. Rows are the vectors (D) of positions or slots, Banks the rows
of each layer. S_n: the n-th segment; H_n: its short-term states; T: its length; m slots, L layers, width D.

The text leaves things open, and in places contradicts itself. What was decided, with the letters that mark it below:

Inputs
 (a) x = sqrt(D) p for the parameters p of an item, and a score is x_j . V / sqrt(D). The text has no factors.
Eq. 1
 (b) Logits are divided by sqrt(D). The equation has no scale.
 (c) Positions: a learned bias per layer and distance (query minus key, 0 to 2T-1) is added to the logit. The text names
     position embeddings only.
 (d) Mask: a position sees S_{n-1}, the earlier positions of S_n and itself.
 (e) Nothing else: one head, no residual, no LayerNorm, no feed-forward, no output projection.
 (f) Eq. 2 reads M^0..M^{L-1}, eq. 4 and 5 have M^1..M^L: M^L would never be read, and M^0 never written. Here bank
     l = 0..L-1 holds the inputs of layer l+1 everywhere, and is read with the weights of layer l+1.
Eq. 2
 (g) Scale as in (b). No positions and no mask: slots have no place, and all they hold is older than S_{n-1}.
Eq. 4
 (h) M before the first absorption is M_0, learned slots. Eq. 9 trains them where a segment reads them as they are.
 (i) Nothing is absorbed after S_1. While S_n is processed, M covers S_1..S_{n-2}.
 (j) A segment shorter than T has fewer rows. They are the last primaries: i = m+T-length+1..m+T.
Eq. 5
 (k) Queries, keys and values go through W_Q, W_K, W_V and the scale of eq. 1, without its positions and its mask.
 (l) M is the old memory in the first attention and the new one in the second.
 (m) Queries, weights, H_{n-1} and the old M are constants: the gradient goes through this one use of f_abs.
 (n) A training step divides by the number of positions of the segments with something to absorb.
Eq. 6-8
 (o) W_ij is one matrix per slot j (routing="slot") or one per pair (routing="full").
 (p) Interest capsules start as the old slots. The text gives no start.
 (q) b_ij is set anew in each iteration, as eq. 6 has it. Sabour et al. add to it.
 (r) alpha_ij sums to one over the slots j, as in Sabour et al., or over the primaries i (routing_softmax="primaries").
     In eq. 7 the index that is summed is that of the slots and its range that of the primaries.
Eq. 9
 (s) V at position t predicts the event after t, also over the border of two segments. The first event is no target.
 (t) Of the negatives, those that equal the target are left out. One that is drawn twice counts twice.
 (u) A training step divides by the number of positions.
Training
 (v) The second loss is eq. 5; the text says eq. 6. Two Adams: f_abs on eq. 5, the rest on eq. 9. Both gradients are
     those at the weights from before the step. Each Adam moves in every step, also where its gradient is zero.
 (w) What a segment leaves behind is constant for the next one. M is made by f_abs as it is when the segment that reads
     M begins, so after the step of the segment before.
Variants
 (x) xl: V = H_n.
 (y) fifo: M is the last m rows of M || H_{n-1}, so M_0 is pushed out row by row. There is no eq. 5.
 (z) nran: eq. 1 sees S_n alone, and H_{n-1} is absorbed when S_n begins, so that M covers S_1..S_{n-1}.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from dman_train.config import ModelConfig

Rows = list[Tensor]
Banks = list[Rows]


def total(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum(0)


def softmax(logits: Rows) -> Rows:
    exponentials = [torch.exp(logit - max(logits).detach()) for logit in logits]
    return [exponential / total(exponentials) for exponential in exponentials]


def squash(s: Tensor) -> Tensor:
    """Eq. 8."""
    squared = s @ s
    return squared / (1 + squared) * s / torch.sqrt(squared)


def constant(banks: Banks) -> Banks:
    return [[row.detach() for row in rows] for rows in banks]


class Attention(NamedTuple):
    """The three matrices (D, D) of one layer of eq. 1 or 2; a row h is mapped to h W^T."""

    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor

    def read(self, query: Tensor, sources: Rows, bias: Rows | None = None) -> Tensor:
        """softmax(Q K^T / sqrt(D) + bias) V for one query: (D). (b)"""
        logits = [(self.W_Q @ query) @ (self.W_K @ source) / sqrt(len(query)) for source in sources]
        if bias is not None:
            logits = [logit + b for logit, b in zip(logits, bias, strict=True)]
        return total(weight * (self.W_V @ source) for weight, source in zip(softmax(logits), sources, strict=True))

    def fixed(self) -> Attention:
        return Attention(*(matrix.detach() for matrix in self))


@dataclass(frozen=True)
class User:
    """What S_1..S_{n-1} left behind when S_n begins."""

    previous: Banks = field(default_factory=list)  # H_{n-1}; none before S_1
    waiting: Banks = field(default_factory=list)  # H_{n-2}, which M has yet to absorb; with nran always none
    memory: Banks | None = None  # M as S_{n-1} read it; None: nothing was absorbed yet


class Processed(NamedTuple):
    """S_n after eq. 1-5."""

    hidden: Banks  # H_n^0..H_n^{L-1}
    V: Rows
    memory: Banks  # as it was read
    abstraction: Tensor | None  # eq. 5; None if there was nothing to absorb, or f_abs has no weights
    user: User  # for S_{n+1}


class PaperDMAN:
    """The network with the weights of a DMAN of architecture "paper"."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]) -> None:
        self.config, self.D = config, config.width
        self.weights = {name: weight.detach().double().clone().requires_grad_() for name, weight in weights.items()}

    def attention(self, branch: str, layer: int) -> Attention:
        """`branch`: "short_term" for eq. 1, "long_term" for eq. 2."""
        w, name = self.weights, f"{branch}.{layer}.attention"
        return Attention(w[f"{name}.query.weight"], w[f"{name}.key"][0], w[f"{name}.value"][0].T)

    def x(self, item: int) -> Tensor:
        """(a)"""
        return sqrt(self.D) * self.weights["items"][item]

    def score(self, item: int, V: Tensor) -> Tensor:
        """(a)"""
        return self.x(item) @ V / sqrt(self.D)

    def short_term(self, X: Rows, previous: Banks) -> tuple[Banks, Rows]:
        """Eq. 1: H_n^0..H_n^{L-1} and H_n^L."""
        banks, H = [], X
        for layer in range(self.config.layers):
            banks.append(H)
            before = constant(previous)[layer] if previous else []  # SG(H_{n-1})
            H = [self.recurrent_read(layer, before + banks[layer][: t + 1]) for t in range(len(X))]  # (d)
        return banks, H

    def recurrent_read(self, layer: int, sources: Rows) -> Tensor:
        """Eq. 1 for the position that is the last of `sources`."""
        last = len(sources) - 1
        bias = [self.weights["distance_bias"][layer, 0, last - k] for k in range(len(sources))]  # (c)
        return self.attention("short_term", layer).read(sources[last], sources, bias)

    def long_term(self, X: Rows, memory: Banks) -> Rows:
        """Eq. 2: H^_n^L. (g)"""
        H = X
        for layer in range(self.config.layers):
            H = [self.attention("long_term", layer).read(query, memory[layer]) for query in H]
        return H

    def gate(self, short: Tensor, long: Tensor) -> Tensor:
        """Eq. 3 at one position."""
        W_short, W_long = self.weights["gate_short.weight"].T, self.weights["gate_long.weight"].T
        G = 1 / (1 + torch.exp(-(short @ W_short + long @ W_long)))
        return G * short + (1 - G) * long

    def W(self, layer: int, i: int, j: int) -> Tensor:
        """W_ij of eq. 6-7 for primary i of m+T and slot j, applied as W x. (o)"""
        maps = self.weights[f"abstraction.{layer}.maps"]
        return (maps[i, j] if self.config.routing == "full" else maps[j]).T

    def f_abs(self, layer: int, memory: Rows, hidden: Rows) -> Rows:
        """Eq. 4."""
        m, x = len(memory), memory + hidden
        if self.config.variant == "fifo":
            return x[-m:]  # (y)
        shift = self.config.segment_length - len(hidden)  # (j)
        index = [i if i < m else i + shift for i in range(len(x))]
        votes = [[self.W(layer, index[i], j) @ x[i] for j in range(m)] for i in range(len(x))]  # W_ij x_i
        capsules = memory  # (p)
        for _ in range(self.config.routing_iterations):
            b = [[capsules[j] @ votes[i][j] for j in range(m)] for i in range(len(x))]  # eq. 6, (q)
            if self.config.routing_softmax == "slots":  # (r)
                alpha = [softmax(b[i]) for i in range(len(x))]
            else:
                by_slot = [softmax([b[i][j] for i in range(len(x))]) for j in range(m)]
                alpha = [[by_slot[j][i] for j in range(m)] for i in range(len(x))]
            s = [total(alpha[i][j] * votes[i][j] for i in range(len(x))) for j in range(m)]  # eq. 7
            capsules = [squash(s[j]) for j in range(m)]  # eq. 8
        return capsules

    def absorb(self, memory: Banks, hidden: Banks) -> Banks:
        """Eq. 4 in every layer."""
        return [self.f_abs(layer, memory[layer], hidden[layer]) for layer in range(self.config.layers)]

    def abstraction_loss(self, old: Banks, absorbed: Banks, queries: Banks) -> Tensor:
        """Eq. 5: sums over layers, positions and coordinates."""
        old, absorbed, queries = constant(old), constant(absorbed), constant(queries)  # (m)
        new, squares = self.absorb(old, absorbed), []
        for layer in range(self.config.layers):
            recurrent = self.attention("short_term", layer).fixed()  # (k)
            for query in queries[layer]:
                left = recurrent.read(query, old[layer] + absorbed[layer])  # (l)
                difference = left - recurrent.read(query, new[layer])
                squares.append(difference @ difference)
        return total(squares)

    def process(self, items: list[int], user: User) -> Processed:
        """Eq. 1-5 for S_n."""
        X, variant = [self.x(item) for item in items], self.config.variant
        hidden, short = self.short_term(X, [] if variant == "nran" else user.previous)  # (z)
        if variant == "xl":
            return Processed(hidden, short, [], None, User(previous=constant(hidden)))  # (x)
        M_0 = [list(rows) for rows in self.weights["initial_memory"]]  # (h)
        before = M_0 if user.memory is None else user.memory
        due = user.previous if variant == "nran" else user.waiting  # (i), (z)
        memory = constant(self.absorb(before, due)) if due else before  # (w)
        V = [self.gate(*pair) for pair in zip(short, self.long_term(X, memory), strict=True)]
        loss = None
        if user.previous and variant != "fifo":
            old = before if variant == "nran" else memory
            loss = self.abstraction_loss(old, user.previous, queries=hidden)
        waiting = [] if variant == "nran" else user.previous
        left = constant(memory) if due or user.memory is not None else None
        return Processed(hidden, V, memory, loss, User(constant(hidden), waiting, left))

    def next_item_loss(self, V: Tensor, target: int, negatives: list[int], kind: str) -> Tensor:
        """Eq. 9 at one position, over all items ("full") or a few, or its binary form ("negatives")."""
        if kind == "full":
            negatives = list(range(len(self.weights["items"])))
        positive = self.score(target, V)
        others = [self.score(item, V) for item in negatives if item != target]  # (t)
        if kind == "negatives":
            return total([torch.log(1 + torch.exp(-positive)), *(torch.log(1 + torch.exp(s)) for s in others)])
        return -torch.log(softmax([positive, *others])[0])


class Adam:
    """Kingma and Ba, with the bounded length of the gradient that training may ask for."""

    def __init__(self, weights: list[Tensor], beta2: float, clip: float) -> None:
        self.weights, self.beta1, self.beta2, self.clip, self.t = weights, 0.9, beta2, clip, 0
        self.m, self.v = ([torch.zeros_like(w) for w in weights] for _ in range(2))

    def step(self, gradients: list[Tensor], rate: float) -> None:
        self.t += 1
        length = sqrt(sum(float(g.square().sum()) for g in gradients))
        shorten = min(1.0, self.clip / (length + 1e-6)) if self.clip else 1.0
        for w, g, m, v in zip(self.weights, gradients, self.m, self.v, strict=True):
            m.copy_(self.beta1 * m + (1 - self.beta1) * shorten * g)
            v.copy_(self.beta2 * v + (1 - self.beta2) * (shorten * g) ** 2)
            corrected_m, corrected_v = m / (1 - self.beta1**self.t), v / (1 - self.beta2**self.t)
            w.data -= rate * corrected_m / (torch.sqrt(corrected_v) + 1e-8)


class Segment(NamedTuple):
    """S_n in training: items, the event that follows each (s), negatives of each; `first`: n = 1."""

    items: list[int]
    targets: list[int]
    negatives: list[list[int]]
    first: bool


class PaperTraining:
    """Both optimisers over users side by side, one segment of each a step. (v)"""

    def __init__(self, network: PaperDMAN, *, users: int, loss: str, beta2: float, clip: float) -> None:
        self.network, self.loss, self.users = network, loss, [User() for _ in range(users)]
        f_abs = [name.startswith("abstraction.") for name in network.weights]
        weights = list(network.weights.values())
        self.rest = Adam([w for w, chosen in zip(weights, f_abs, strict=True) if not chosen], beta2, clip)
        self.f_abs = Adam([w for w, chosen in zip(weights, f_abs, strict=True) if chosen], beta2, clip)

    def losses(self, segments: list[Segment]) -> tuple[Tensor, Tensor]:
        """Eq. 9 and eq. 5 of a step, divided by the positions that count. (n), (u) The users move on by a segment."""
        likelihood, abstraction, judged = [], [], 0
        for lane, segment in enumerate(segments):
            done = self.network.process(segment.items, User() if segment.first else self.users[lane])
            self.users[lane] = done.user
            for V, target, negatives in zip(done.V, segment.targets, segment.negatives, strict=True):
                likelihood.append(self.network.next_item_loss(V, target, negatives, self.loss))
            if done.abstraction is not None:
                abstraction.append(done.abstraction)
                judged += len(segment.items)
        nothing = torch.zeros((), dtype=torch.float64)
        return total(likelihood) / len(likelihood), total(abstraction) / judged if abstraction else nothing

    def step(self, segments: list[Segment], *, rate: float, abstraction_rate: float) -> tuple[float, float]:
        """One step of both optimisers. Returns the losses before it."""
        likelihood, abstraction = self.losses(segments)
        gradients = [self.gradients(likelihood, self.rest), self.gradients(abstraction, self.f_abs)]
        self.rest.step(gradients[0], rate)
        self.f_abs.step(gradients[1], abstraction_rate)
        return likelihood.item(), abstraction.item()

    @staticmethod
    def gradients(loss: Tensor, optimiser: Adam) -> list[Tensor]:
        if not loss.requires_grad or not optimiser.weights:
            return [torch.zeros_like(w) for w in optimiser.weights]
        return list(torch.autograd.grad(loss, optimiser.weights, retain_graph=True, materialize_grads=True))
