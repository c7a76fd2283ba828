"""Strict numerics for every test: 8 fake CPU devices, rank promotion raises, warnings are errors (pyproject.toml)."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # tests count compilations, and leave the user's folders alone
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects, and counts as deselected, what needs the shared folder where there is none."""
    if (SHARED / "fixtures").exists():
        return
    kept = [item for item in items if item.get_closest_marker("fixtures") is None]
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("fixtures")])
    items[:] = kept


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared fixtures, data and tokenizer beside the checkout."""
    return SHARED
