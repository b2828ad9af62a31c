"""Some of what ``tests.support.hostile_frames`` sends to the services' ports: it has more."""

from pathlib import Path

import pytest

from tests.support.hostile_frames import run, targets


@pytest.mark.timeout(120)
def test_no_bytes_hurt_a_service(tmp_path: Path) -> None:
    with targets(tmp_path) as running:
        found = run(running, count=240, seed=3)
    assert found.wrong == []
    assert found.beside > 5, "others are served meanwhile"
    assert found.answers["OK"] > 10, "some calls are good"
    assert found.answers["INVALID_ARGUMENT"] > 5, "and many are not"
    assert found.answers["400"] > 5
