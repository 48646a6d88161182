"""Fixtures of all tests."""

import os

import pytest
from reference import Golden


def pytest_collection_modifyitems(items):
    """The longest begin, so that no core waits for them at the end."""
    items.sort(key=lambda item: item.path.parent.name != "faults")


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory):
    """Encoded rows of the tests stay out of the user's caches."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session", params=["glm", "glm2", "glm3"])
def golden(request):
    """The three families, one after another."""
    return Golden(request.param)
