"""The alert rules that are generated."""

from __future__ import annotations

import pytest

from deploy.alerts import generate

FILES = generate.generated()


@pytest.mark.parametrize("path", FILES)
def test_what_is_committed_is_what_is_generated(path: str) -> None:
    assert (generate.DEPLOY / path).read_text() == FILES[path], "run make rules"
