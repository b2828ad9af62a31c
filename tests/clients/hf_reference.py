"""What lm-eval's ``hf`` model gives: ``hf_reference.py PACKAGES MODEL FOLDER TASKS...``.

Run by the Python that has torch and transformers. PACKAGES is where the clients' packages are, and
with them lm-eval; FOLDER has the tasks, and gets the answers as ``hf.json``.
"""

import json
import site
import sys
from pathlib import Path


def main(packages: str, model: str, folder: str, *tasks: str) -> None:
    site.addsitedir(packages)  # behind its own, which come first
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": model, "dtype": "float32", "device": "cpu"},
        tasks=list(tasks),
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    assert found is not None
    answers = {
        task: [sample["resps"] for sample in sorted(samples, key=lambda one: one["doc_id"])]
        for task, samples in found["samples"].items()
    }
    Path(folder, "hf.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
