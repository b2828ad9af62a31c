"""What quantisation costs the demo model stays within the bounds that docs/fidelity.md reports."""

from pathlib import Path

from precast.evaluation.perplexity import TEXT, evaluate
from precast.models.precision import Precision
from precast.ops.native import start_threads

BOUNDS = [
    (Precision(quantization="q8_0", head_quantization="q8_0"), 0.015),
    (Precision(quantization="int8", head_quantization="int8"), 0.015),
    (Precision(quantization="q4_1", head_quantization="q8_0"), 0.015),
    (Precision(kv_dtype="int8"), 0.01),
]


def test_perplexity_of_the_demo_model(demo_model: Path) -> None:
    start_threads((-1, -1))  # pinned to no core: other tests of this process go on with all
    text = TEXT.read_text()[:2400]
    scores = evaluate(demo_model, [precision for precision, _ in BOUNDS], text, 256)
    for score, (precision, bound) in zip(scores, BOUNDS, strict=True):
        assert abs(score.perplexity_change) < bound, precision
        assert score.top1_agreement > 0.93, precision
