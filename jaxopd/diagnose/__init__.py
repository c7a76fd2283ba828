"""The pipeline of paper A: from questions to alignment, resumable piece by piece.

Phase 1, shared by all teachers: demonstrations, initial rollouts, representative paths, what each model watches on
them, targeted rollouts (at exits, or the paper's targets). Phase 2, per teacher: success estimates and node records.
Each stage works through the questions and commits one piece a question, so that a killed run loses at most the piece in
flight.
"""

from jaxopd.diagnose.config import DiagnoseConfig
from jaxopd.diagnose.demonstrations import demonstrate, summarize
from jaxopd.diagnose.exits import enrich_exits
from jaxopd.diagnose.launches import enrich, find_truth, roll_out
from jaxopd.diagnose.nodes import included, reward, score, watch
from jaxopd.diagnose.session import Progress, Session
from jaxopd.diagnose.tables import record
from jaxopd.runs import RunFolder

__all__ = ["DiagnoseConfig", "collect", "diagnose"]


def diagnose(config: DiagnoseConfig, out: str, progress: Progress = lambda stage, done, total: None) -> RunFolder:
    """Runs, or resumes, a whole diagnosis into the folder `out` and gives that folder.

    Raises InputError, before anything is written, on input that cannot work.
    """
    config.check_options()
    session = Session(config, out, progress)
    reward(session, collect(session))
    record(session)
    return session.run


def collect(session: Session) -> list[int]:
    """Runs phase 1: everything that is sampled, and the scores that aim it. Gives the questions included."""
    demonstrate(session)
    summarize(session)
    roll_out(session)
    watch(session)
    chosen = included(session)
    score(session, chosen)
    (enrich_exits if session.config.allocation == "exits" else enrich)(session, chosen)
    if session.config.truth_rollouts:
        find_truth(session, chosen)
    return chosen
