"""What steps there were: for the status, for autotune and for metrics."""

from services.decode_worker.engine.step import ScheduledStep
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

    def count(self, step: ScheduledStep, graph_size: int, step_us: int) -> None:
        """A step is over that replayed the graph of ``graph_size``; 0: it ran eagerly."""
        if step.prompt_tokens:
            self.graph_prompt_steps += graph_size > 0
            self.eager_prompt_steps += graph_size == 0
        else:
            self.graph_steps += graph_size > 0
            self.eager_steps += graph_size == 0
        self.stats.count(step.tokens, graph_size, decoding=not step.prompt_tokens)
        self._metrics.step(step.decode_tokens, step.prompt_tokens, graph_size, step_us)
