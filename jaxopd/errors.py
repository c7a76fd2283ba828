"""The one exception for input that a user can mend."""


class InputError(ValueError):
    """Says in one sentence which file, line or field is wrong, what was found and what was expected.

    The command line prints the sentence and exits with code 2; library users catch it like any ValueError.
    """
