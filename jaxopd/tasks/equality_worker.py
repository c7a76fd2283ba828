"""math-verify's verdict on two expressions; run by `jaxopd.confined`, which ends it at its limits."""

import logging

from math_verify import parse, verify

logging.disable(logging.CRITICAL)  # it logs hostile answers in full


def answer(pair: list[str]) -> bool:
    """Decide whether [gold, stated] are equal."""
    # the delimiters make it read each side as one expression
    gold, stated = (parse(f"${side}$", parsing_timeout=0, raise_on_error=True) for side in pair)
    return bool(verify(gold, stated, allow_set_relation_comp=True, timeout_seconds=0))
