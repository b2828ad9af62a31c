"""What steps there were: for the status, for autotune and for metrics."""

from collections.abc import Sequence

from services.decode_worker.engine.step import StepBatch
from services.decode_worker.graphs.autotune.stats import StepStats
from services.decode_worker.metrics import Metrics


class StepCounts:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.stats = StepStats()
        self.graph_steps = 0
        self.eager_steps = 0
        """Steps that only decoded."""
        self.graph_prompt_steps = 0
        self.eager_prompt_steps = 0
        """Steps with tokens of prompts."""

    def count(self, batch: StepBatch, graph_size: int, steps_us: Sequence[int]) -> None:
        """Steps of a batch are over that took so long each and replayed the graph of
        ``graph_size``; 0: they ran eagerly."""
        times = len(steps_us)
        if batch.prompt_tokens:
            self.graph_prompt_steps += times * (graph_size > 0)
            self.eager_prompt_steps += times * (graph_size == 0)
        else:
            self.graph_steps += times * (graph_size > 0)
            self.eager_steps += times * (graph_size == 0)
        decoding = not batch.prompt_tokens
        self.stats.count(batch.tokens, graph_size, decoding=decoding, times=times)
        self._metrics.steps(batch.decode_tokens, batch.prompt_tokens, graph_size, steps_us)
