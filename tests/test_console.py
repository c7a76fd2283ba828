"""What the verbs share: the cache of compiled programs, and which memory plans are shown."""

import io
import logging
import os
import subprocess
import sys

import pytest
from rich.console import Console

from jaxopd.rollouts.plan import MemoryPlan
from jaxopd.verbs.console import show_notices

COMPILES = """
import jax, numpy as np
from jaxopd.verbs import console
console.LEAST_COMPILE_SECONDS = 0.0
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
console.keep_compiled()
jax.jit(lambda x: x * 2 + 1)(np.arange(5.0)).block_until_ready()
print(sum(hits), jax.config.jax_compilation_cache_dir)
"""


def compiling(**environment: str) -> tuple[int, str]:
    """Compiles one function in a fresh process; gives the programs found in the cache and the cache's folder."""
    settings = {name: value for name, value in os.environ.items() if name != "JAX_ENABLE_COMPILATION_CACHE"}
    command = [sys.executable, "-W", "error", "-c", COMPILES]
    told = subprocess.run(command, env=settings | environment, capture_output=True, text=True, check=True)
    hits, folder = told.stdout.split()
    return int(hits), folder


def test_compiled_programs_outlive_their_process(tmp_path) -> None:
    first, folder = compiling(XDG_CACHE_HOME=str(tmp_path))
    again, same = compiling(XDG_CACHE_HOME=str(tmp_path))
    assert (first, again) == (0, 1)
    assert folder == same
    assert folder.startswith(str(tmp_path / "jaxopd"))


def test_a_cache_the_user_chose_is_kept(tmp_path) -> None:
    assert compiling(JAX_COMPILATION_CACHE_DIR=str(tmp_path))[1] == str(tmp_path)


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    assert compiling(XDG_CACHE_HOME=str(taken)) == (0, "None")


@pytest.fixture
def shown():
    """What the package's log shows, until the test is over."""
    log, text = logging.getLogger("jaxopd"), io.StringIO()
    before = log.handlers, log.level
    show_notices(Console(file=text, width=200))
    yield text
    log.handlers, log.level = before


def test_plans_are_shown_when_they_grow_and_warnings_always(shown) -> None:
    log = logging.getLogger("jaxopd.rollouts.engine")
    for slots, size in ((1, 100), (2, 140), (3, 160), (4, 90)):
        log.info("memory plan: %s", MemoryPlan(1, slots, size * 10**9, 0, 0, 0, 10**12))
    log.warning("out of device memory: %d slots", 4)
    lines = shown.getvalue().splitlines()
    assert [line.split(" slots")[0] for line in lines] == [
        "memory plan: 1 x 1",
        "memory plan: 1 x 3",
        "out of device memory: 4",
    ]
