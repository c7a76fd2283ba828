"""The command line of jaxopd."""

import dataclasses
import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from typing import Annotated

import jax
import tyro
from rich.console import Console

from jaxopd import distributed
from jaxopd.errors import InputError
from jaxopd.verbs.compare import Compare
from jaxopd.verbs.console import keep_compiled, show_notices
from jaxopd.verbs.convert import Convert
from jaxopd.verbs.demo import Demo, Truth
from jaxopd.verbs.diagnose import Diagnose, MakeReport
from jaxopd.verbs.lab import Lab
from jaxopd.verbs.plan import MakePlan
from jaxopd.verbs.screen import Screen
from jaxopd.verbs.toy import Toy
from jaxopd.verbs.train import Corpus, Evaluate, Preflight, Train

PIPED_WIDTH = 140  # columns of a table that goes into a file
BAD_INPUT, LOST_PROCESS, STOPPED, INTERRUPTED = 2, 3, 75, 130  # exit codes; 75, EX_TEMPFAIL, asks for another try

Verb = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Diagnose, tyro.conf.subcommand("diagnose")]
    | Annotated[MakeReport, tyro.conf.subcommand("report")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Screen, tyro.conf.subcommand("screen")]
    | Annotated[Truth, tyro.conf.subcommand("truth")]
    | Annotated[Lab, tyro.conf.subcommand("lab")]
    | Annotated[MakePlan, tyro.conf.subcommand("plan")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Preflight, tyro.conf.subcommand("preflight")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Corpus, tyro.conf.subcommand("corpus")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Toy, tyro.conf.subcommand("toy")]
)


RESUMABLE = (Diagnose, Demo, Screen, Train)  # what SIGTERM may interrupt
SHARED = (*RESUMABLE, Convert)  # what several processes can do together


@dataclasses.dataclass(frozen=True)
class Command:
    """On-policy distillation, measured token by token. `jaxopd VERB --help` explains a verb; --version prints it."""

    verb: tyro.conf.OmitArgPrefixes[tyro.conf.OmitSubcommandPrefixes[Verb]]

    def run(self) -> None:
        if isinstance(self.verb, SHARED):
            self.verb.hosts.join()
        keep_compiled()
        console = Console(quiet=not distributed.is_first())
        if not console.is_terminal:
            console = Console(width=PIPED_WIDTH, quiet=console.quiet)
        show_notices(console)
        with distributed.preemptible() if isinstance(self.verb, RESUMABLE) else nullcontext():
            self.verb.run(console)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb and gives the exit code of `guarded`."""
    if (sys.argv[1:] if arguments is None else list(arguments)) == ["--version"]:
        print(f"jaxopd {version('jaxopd')}")
        return 0
    return guarded(tyro.cli(Command, args=arguments, prog="jaxopd").run)


def guarded(run: Callable[[], None]) -> int:
    """Runs something and gives the exit code; what went wrong is told in one sentence.

    0 it worked, 2 bad input or a full disk, 3 another process of the run was lost, 75 and 130 stopped by SIGTERM and
    Ctrl-C.
    """
    again = "what was finished is saved, and the same command goes on from there"
    try:
        run()
        return 0
    except distributed.Preempted as stop:
        return _tell(f"stopped by {stop}: {again}", INTERRUPTED if str(stop) == "Ctrl-C" else STOPPED, by_all=True)
    except distributed.SharedError as error:
        return _tell(str(error), BAD_INPUT, by_all=True)
    except KeyboardInterrupt:
        distributed.leave(INTERRUPTED)  # the others would wait for a regular end
        return _tell("stopped by Ctrl-C", INTERRUPTED)
    except Exception as error:
        code = _failure(error, again)
        distributed.leave(code)
        return code


def _failure(error: Exception, again: str) -> int:
    """Tells what this process alone may have met, and gives the exit code; raises it again where nothing is known."""
    if isinstance(error, InputError):
        return _tell(str(error), BAD_INPUT)
    if any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):  # exceptions of many libraries
        where = getattr(error, "filename", None) or "output"
        return _tell(f"{where}: found no free disk space, expected room for it", BAD_INPUT)
    if not distributed.several():
        raise error
    traceback.print_exception(error)
    if not isinstance(error, jax.errors.JaxRuntimeError) or "RESOURCE_EXHAUSTED" in str(error):
        return 1
    return _tell(f"found no answer from another process of this run, expected all of them alive; {again}", LOST_PROCESS)


def _tell(sentence: str, code: int, by_all: bool = False) -> int:
    """Prints a sentence, once where all processes have the same one to tell, and gives the exit code."""
    if distributed.is_first():
        print(f"jaxopd: {sentence}", file=sys.stderr)
    elif not by_all:
        print(f"jaxopd: process {jax.process_index()}: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
