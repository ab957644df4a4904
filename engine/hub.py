"""Distinguish Hugging Face hub names from paths, and silence the hub client's warnings."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

NO_HUB_NAME = 'nor a hub name ("owner/name", with no directory "owner" here)'
"""End of the message for a name that is neither a local path nor a hub name."""


def is_hub_name(name: str) -> bool:
    """True if `name` has the form "owner/name" and there is no local directory "owner".

    With such a directory, `name` is a mistyped path, for which a hub look-up would only cost time.
    """
    return bool(_HUB_NAME.fullmatch(name)) and not Path(name).parent.is_dir()


def needs_hub(name: str, kind: Literal["model", "dataset"]) -> bool:
    """True if `name` is neither a local path nor cached, so that the hub will be contacted.

    Without a network the client retries for 23 s; no setting shortens that.
    """
    from huggingface_hub import constants  # imported late: local files need no hub

    cached = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
    return is_hub_name(name) and not Path(name).exists() and not cached.is_dir()


@contextmanager
def quiet_hub_client() -> Iterator[None]:
    """Suppress the hub client's warning for each retry; its final error has the cause."""
    from huggingface_hub.utils import logging  # imported late: slow, and local files need no hub

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
