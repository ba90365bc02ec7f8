"""One studio for all tests."""

from __future__ import annotations

import pytest

from tests.generation.studio import Studio, make_studio


@pytest.fixture(scope="session")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    pytest.importorskip("librosa", reason="librosa is not installed (extra generation)")
    return make_studio(tmp_path_factory.mktemp("studio"))
