"""lm-eval's ``local-completions``: a log-likelihood task and a generation task, on local data.

The parrot gives the n-th token of a prompt the probability exp(-n / 4), and repeats the prompt.
"""

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from conftest import MODEL
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
CHOICE = """\
doc_to_choice: ["yes", "yes yes yes"]
doc_to_target: 0
metric_list:
  - metric: acc
"""
GENERATE = """\
generation_kwargs:
  until: [" fox"]
  max_gen_toks: 30
metric_list:
  - metric: exact_match
"""


def model(base: str, **options: Any) -> LocalCompletionsAPI:
    return LocalCompletionsAPI(
        model=MODEL,
        base_url=f"{base}/completions",
        tokenizer_backend="remote",
        num_concurrent=1,
        max_length=2048,
        **options,
    )


@pytest.fixture
def tasks(tmp_path: Path) -> TaskManager:
    documents = [{"question": "the quick fox ", "answer": "the quick"}] * 3
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, documents)))
    data = tmp_path / "data.json"
    for name, kind, more in (
        ("choice", "multiple_choice", CHOICE),
        ("generate", "generate_until", GENERATE),
    ):
        text = TASK.format(name=name, data=data, kind=kind, more=more)
        if kind == "multiple_choice":
            text = text.replace('doc_to_target: "{{answer}}"\n', "", 1)
        (tmp_path / f"{name}.yaml").write_text(text)
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_lm_eval(base: str, tasks: TaskManager, batch_size: int) -> None:
    found = lm_eval.simple_evaluate(
        model=model(base, batch_size=batch_size),
        tasks=["choice", "generate"],
        task_manager=tasks,
        bootstrap_iters=0,
    )
    assert found is not None
    results = found["results"]
    assert results["choice"]["acc,none"] == 1.0, "the shorter answer is the likelier one"
    assert results["generate"]["exact_match,none"] == 1.0


def test_log_likelihoods(base: str) -> None:
    """The sum of -n / 4 over the continuation's tokens, which come behind the context's."""
    lm = model(base, batch_size=2)
    context, continuation = list(b"ABC"), list(b"DE")
    [(found, is_greedy)] = lm._loglikelihood_tokens(
        [(("ABC", "DE"), context, continuation)], disable_tqdm=True
    )
    assert found == pytest.approx(-(3 + 4) / 4)
    assert isinstance(is_greedy, bool)
