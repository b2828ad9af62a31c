"""Loads and replays captured graphs. The only module that touches torch's package loader.

The caller has verified the artifact: loading one runs its native code. Loading takes milliseconds
and no compiler, because the loader's class is used directly; ``torch._inductor.aoti_load_package``
would probe the compiler for seconds.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from precast.errors import ArtifactRejected
from precast.models.kv_cache import LayerCache
from precast.models.layers import Paging, Shape
from precast.models.load import Weights
from precast.models.windows import window_of
from precast.ops import native as native  # registers the operators that graphs call
from precast.system.scratch import scratch_root


class Graph:
    """A captured step of up to ``tokens`` tokens, bound to a rank's weights and KV cache."""

    def __init__(
        self,
        package: Path,
        tokens: int,
        shape: Shape,
        weights: Weights,
        caches: list[LayerCache],
    ) -> None:
        """Raises ArtifactRejected if the package can't be loaded."""
        self.tokens = tokens
        try:
            with _unpacking_folder():
                self._runner: Any = torch.classes.precast.StepRunner(
                    str(package), layer_models(shape), tokens
                )
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ArtifactRejected(f"{package}: not a loadable graph: {reason}") from error
        self._runner.bind(*runner_weights(weights, caches), *runner_plan(shape, weights))

    def replay(
        self,
        token_ids: Tensor,
        positions: Tensor,
        paging: Paging,
        rows: Tensor | None = None,
        *,
        window_paging: Paging | None = None,
    ) -> Tensor:
        """int64 [T] ids and positions, T at most ``tokens``, to this rank's float32 logits [R, V]
        of the tokens that ``rows``, int64 [R], names; of all T without it. For R = 0 the head is
        left out, and what is returned is empty. ``window_paging``: of layers that attend to a
        window, if it is another."""
        windows = list(window_paging or ())
        logits: Tensor = self._runner.run(token_ids, positions, list(paging), windows, rows)
        return logits


@contextmanager
def _unpacking_folder() -> Iterator[None]:
    """Where the loader unpacks a package, gone once the native code is mapped.

    Only its owner can enter it. The loader would keep its copies until the graph is freed, for good
    if the process is killed.
    """
    before = os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="precast-graph-", dir=scratch_root()) as folder:
        os.environ["TMPDIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = before


def runner_weights(
    weights: Weights, caches: list[LayerCache]
) -> tuple[list[Tensor], list[list[Tensor]], list[Tensor]]:
    """Weights as ``StepRunner.bind`` takes them: each layer's cache in front of its weights."""
    layers = [
        [cache.k, cache.v, *tree_leaves(layer)]
        for layer, cache in zip(weights.layers, caches, strict=True)
    ]
    return tree_leaves(weights.embed), layers, tree_leaves(weights.head)


def layer_models(shape: Shape) -> list[str]:
    """Names of a package's layer models, as ``StepRunner`` takes them."""
    return [f"layer.{kind}" for kind in shape.kinds]


def runner_plan(shape: Shape, weights: Weights) -> tuple[list[int], list[int], list[int]]:
    """For each layer, the index of its model and of its rope, and 1 if it has a window."""
    kinds = [shape.kinds.index(layer.kind) for layer in weights.plan]
    windows = [int(window_of(shape.options, layer.kind) > 0) for layer in weights.plan]
    return kinds, [layer.rope for layer in weights.plan], windows
