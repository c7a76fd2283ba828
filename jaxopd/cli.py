"""The command line of jaxopd."""

import errno
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from jaxopd.errors import InputError
from jaxopd.verbs.compare import Compare
from jaxopd.verbs.console import keep_compiled, show_notices
from jaxopd.verbs.demo import Demo, Truth
from jaxopd.verbs.diagnose import Diagnose, MakeReport
from jaxopd.verbs.lab import Lab
from jaxopd.verbs.screen import Screen
from jaxopd.verbs.toy import Toy
from jaxopd.verbs.train import Corpus, Evaluate, Preflight, Train

PIPED_WIDTH = 140  # columns of a table that goes into a file

Verb = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Diagnose, tyro.conf.subcommand("diagnose")]
    | Annotated[MakeReport, tyro.conf.subcommand("report")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Screen, tyro.conf.subcommand("screen")]
    | Annotated[Truth, tyro.conf.subcommand("truth")]
    | Annotated[Lab, tyro.conf.subcommand("lab")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Preflight, tyro.conf.subcommand("preflight")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Corpus, tyro.conf.subcommand("corpus")]
    | Annotated[Toy, tyro.conf.subcommand("toy")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; 0 when it worked, 2 with one sentence on bad input or a full disk."""
    verb = tyro.cli(Verb, args=arguments, prog="jaxopd", description="On-policy distillation, measured token by token.")
    try:
        keep_compiled()
        console = Console()
        console = console if console.is_terminal else Console(width=PIPED_WIDTH)
        show_notices(console)
        verb.run(console)
    except InputError as error:
        print(f"jaxopd: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # libraries say it in exceptions of their own kinds
        if not any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            raise
        where = getattr(error, "filename", None) or "output"
        print(f"jaxopd: {where}: found no free disk space, expected room for it", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
