"""Whether the hub of Hugging Face can be reached: asked once, so that nothing waits for its retries."""

from __future__ import annotations

import logging
from functools import cache

logger = logging.getLogger("holdfast")

SECONDS = 5.0
"""How long the hub has to answer."""


def unreachable() -> str:
    """For a message about a name of the hub: why the hub cannot be reached; empty if it can be."""
    why = find_hub()
    return f"; {why}" if why else ""


@cache
def find_hub() -> str | None:
    """Ask the hub for an answer, whatever it is; where there is none, work with what lies in the cache from here on.

    The hub's library would try six times for each file, with pauses of 23 seconds in all.

    Returns:
        why it cannot be reached, or that HF_HUB_OFFLINE is set; None: it can be reached.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # of any library that this one may use
        constants.HF_HUB_OFFLINE = True
        logger.warning("the hub %s cannot be reached (%s); only its cache is looked into", constants.ENDPOINT, error)
        return f"the hub {constants.ENDPOINT} cannot be reached: {error}"
    return None
