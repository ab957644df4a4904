"""Names on the Hugging Face hub: told from paths, and asked for without the client's warnings."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

NO_HUB_NAME = 'nor a hub name ("owner/name", with no folder "owner" here)'
"""Ends the message on what is neither on disk nor a name that the hub is asked for."""


def is_hub_name(name: str) -> bool:
    """Whether the hub is asked for `name`: "owner/name", unless it lies in a folder that is here.

    A mistyped path in such a folder would otherwise wait for the hub's answer.
    """
    return bool(_HUB_NAME.fullmatch(name)) and not Path(name).parent.is_dir()


def is_asked_for(name: str, kind: Literal["model", "dataset"]) -> bool:
    """Whether `name` lies neither on disk nor in the hub client's cache.

    The client then asks the hub; without a network it tries for 23 s, which no setting shortens.
    """
    from huggingface_hub import constants  # imported late: local files need no hub

    cached = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
    return is_hub_name(name) and not Path(name).exists() and not cached.is_dir()


@contextmanager
def asking_the_hub() -> Iterator[None]:
    """Leaves out the hub client's warning of each attempt: its error says what came of them."""
    from huggingface_hub.utils import logging  # imported late: slow, and local files need no hub

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
