"""The one exception for input that a user can mend, and what other libraries' exceptions say."""


class InputError(ValueError):
    """Says in one sentence which file, line or field is wrong, what was found and what was expected.

    The command line prints the sentence and exits with code 2; library users catch it like any ValueError.
    """


def check_fields(settings: object, *rules: tuple[str, bool, str]) -> None:
    """Raises InputError at the first broken rule: a field, whether its value is good, what is expected."""
    for name, good, expected in rules:
        if not good:
            raise InputError(f"{name}: found {getattr(settings, name)}, expected {expected}")


def first_line(error: BaseException) -> str:
    """Gives what an exception says, as part of a sentence; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
