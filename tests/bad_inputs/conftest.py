from pathlib import Path

import pytest
from bench import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """Models, rows, a cache, a capture, results, signals and a checkpoint, made once and never changed."""
    return make_world(tmp_path_factory.mktemp("world"))
