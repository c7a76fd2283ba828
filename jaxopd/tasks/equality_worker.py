"""The process behind `equality.Worker`: reads ``[gold, answer]`` as JSON lines, writes 1 or 0 for each.

Run as a file, so that it imports nothing of this package. It is never asked to clean up after itself: when a
comparison exceeds its processor time the kernel ends the process, even inside one long integer operation.
"""

import contextlib
import json
import logging
import resource
import signal
import sys

CPU_SECONDS = 3.0
MEMORY_BYTES = 2 << 30


def main() -> None:
    """Answer comparisons until the input ends."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        print(error, flush=True)
        return
    logging.disable(logging.CRITICAL)  # it logs hostile answers in full
    with contextlib.suppress(ValueError, OSError):  # where a lower limit is in force already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        gold, answer = json.loads(line)
        try:
            # the delimiters make it read each side as one expression
            expected, stated = (parse(f"${side}$", parsing_timeout=0, raise_on_error=True) for side in (gold, answer))
            equal = verify(expected, stated, allow_set_relation_comp=True, timeout_seconds=0)
        except Exception:  # whatever a hostile expression provokes, the two are not shown to be equal
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(int(bool(equal)), flush=True)


if __name__ == "__main__":
    main()
