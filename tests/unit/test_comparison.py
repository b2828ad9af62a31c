"""What is kept of a graph that differs from eager, and how much it may."""

import math
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from precast.errors import CaptureFailed
from precast.fleet.queue.job import new_job
from precast.graphs.capture.verify.compare import Outputs, compare
from precast.graphs.capture.verify.failure import MAX_TENSOR_BYTES, Mismatch, read_mismatch
from precast.graphs.capture.verify.tolerances import KV_BOUNDS, LINEAR_BOUNDS, bound_of
from precast.models.precision import KvDtype, Quantization, WeightDtype
from services.compile_worker.failures import MAX_FAILURES_KEPT, Failures

INPUTS = {"context_lens": torch.arange(1, 100), "slots": torch.arange(3)}


def compared(folder: Path, outputs: Outputs, bound: float = 1e-4) -> float:
    return compare(outputs, bound=bound, case="a case", seed=1, inputs=INPUTS, folder=folder)


def failed(folder: Path, outputs: Outputs) -> Mismatch:
    with pytest.raises(CaptureFailed, match="differs from eager") as failure:
        compared(folder, outputs)
    found = read_mismatch(folder)
    assert found
    assert str(failure.value) == found.text
    return found


def test_what_agrees_leaves_nothing(tmp_path: Path) -> None:
    x = torch.randn(4, 5)
    assert compared(tmp_path, {"a": (x, x), "b": (x + 1e-6, x)}) < 1e-5
    assert compared(tmp_path, {"cache of no heads": (torch.empty(0), torch.empty(0))}) == 0
    assert read_mismatch(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_the_worst_element_of_the_worst_output_is_named(tmp_path: Path) -> None:
    x = torch.ones(2, 3, 4)
    a, b = x.clone(), x.clone()
    a[0, 0, 1] = 1.1
    b[1, 2, 3] = -4
    found = failed(tmp_path, {"a": (a, x), "b": (b, x)})
    assert (found.output, found.index, found.actual, found.expected) == ("b", (1, 2, 3), -4.0, 1.0)
    assert found.differences["a"] == pytest.approx(0.1)
    assert found.context_lens == tuple(range(1, 65))
    tensors = load_file(tmp_path / "failure" / "tensors.safetensors")
    assert tensors["actual"].tolist() == [1, 1, 1, -4]
    assert tensors["context_lens"].tolist() == INPUTS["context_lens"].tolist()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_worse_than_any(tmp_path: Path, value: float) -> None:
    x = torch.ones(2, 3)
    a, b = x.clone(), x.clone()
    a[1, 2] = value
    b[0, 0] = 1e30
    found = failed(tmp_path, {"b": (b, x), "a": (a, x)})
    assert (found.output, found.index, found.actual) == ("a", (1, 2), None)
    assert found.differences["a"] == -1.0


def test_large_tensors_are_left_out(tmp_path: Path) -> None:
    rows: Tensor = torch.zeros(1, MAX_TENSOR_BYTES)
    failed(tmp_path, {"a": (rows + 1, rows)})
    assert load_file(tmp_path / "failure" / "tensors.safetensors").keys() == INPUTS.keys()


def test_every_type_has_a_bound_and_the_loosest_counts() -> None:
    assert LINEAR_BOUNDS.keys() == {*get_args(WeightDtype), *get_args(Quantization)} - {"none"}
    assert KV_BOUNDS.keys() == set(get_args(KvDtype))
    exact = {
        "weight_dtype": "fp32",
        "quantization": "none",
        "head_quantization": "none",
        "kv_dtype": "fp32",
        "provider": "reference",
    }
    assert bound_of(exact) == LINEAR_BOUNDS["fp32"] == min(LINEAR_BOUNDS.values())
    for name, value in (
        ("quantization", "q4_0"),
        ("head_quantization", "int8"),
        ("kv_dtype", "bf16"),
        ("kv_dtype", "int8"),
        ("provider", "sgl_kernel"),
    ):
        assert bound_of({**exact, name: value}) > bound_of(exact)
        if name != "provider":
            assert bound_of({**exact, name: value, "provider": "native"}) == 0.0


def test_failures_are_few_and_without_links(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "calls.cpp").write_text("x")
    (scratch / "link.cpp").symlink_to("/etc/passwd")
    (scratch / "stderr.txt").write_bytes(bytes(2 << 20))
    failures = Failures(folder=tmp_path / "failures")
    made = []
    for number in range(MAX_FAILURES_KEPT + 3):
        job = new_job(f"{number:032x}", {"num_tokens": "1"}, num_tokens=1, version=1)
        made.append(failures.keep(job, scratch))
    last = made[-1]
    assert last
    assert last.files == ("calls.cpp", "factors.json")
    assert len(list(failures.folder.iterdir())) == MAX_FAILURES_KEPT
    assert Path(last.folder).is_dir()
    (tmp_path / "file").touch()
    assert Failures(folder=tmp_path / "file").keep(job, scratch) is None
