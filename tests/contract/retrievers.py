"""Every implementation of `Retriever`: add a factory here, and the contract suite runs over it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dman_runtime.retrieval.base import Retriever
from dman_runtime.retrieval.exact import ExactRetriever

RETRIEVERS: dict[str, Callable[[np.ndarray], Retriever]] = {  # from (V, D) float32 item embeddings
    "exact": ExactRetriever,
}
