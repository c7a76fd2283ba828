"""A user's own form, estimator or aggregate: FILE.py:NAME."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from jaxopd.errors import InputError


def load_own(place: str) -> tuple[str, Callable]:
    """Loads the function NAME of FILE.py, which the user names and trusts; gives NAME and the function.

    Raises InputError where there is no such file, it does not run, or NAME is no function of it.
    """
    file, _, name = place.rpartition(":")
    if not file or not name:
        raise InputError(f"{place}: found no FILE.py:NAME, expected for example my_form.py:my_form")
    if not Path(file).is_file():
        raise InputError(f"{file}: found no such file, expected Python code with {name}")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise InputError(f"{file}: found no Python file, expected one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{file}: found {type(error).__name__} ({error}), expected code that runs") from error
    own = getattr(module, name, None)
    if not callable(own):
        raise InputError(f"{file}: found no function {name}, expected one")
    return name, own
