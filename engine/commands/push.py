"""Upload of an export to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from redi.engine.errors import InputError, RunError
from redi.engine.hub import quiet_hub_client


def open_repository(name: str, private: bool) -> None:
    """Create a model repository unless there is one. Called before the export, which takes minutes.

    Raises:
        InputError: the name is invalid, or there is no token that may write to it.
        RunError: the hub cannot be reached.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"push_to_hub: {_line(error)}") from None
    if "/" not in name:
        raise InputError(f'push_to_hub: {name}: needs the form "owner/name"')
    if get_token() is None:
        raise InputError("push_to_hub: no token; run `hf auth login`, or set HF_TOKEN")
    with _explained(name):
        HfApi().create_repo(name, private=private or None, exist_ok=True)


def push(folder: Path, name: str, message: str) -> str:
    """Upload a folder to a repository as one commit, and return the address of the model.

    Raises:
        InputError: the token may not write to it.
        RunError: the hub cannot be reached.
    """
    disable_progress_bars()
    with _explained(name):
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    return f"{constants.ENDPOINT}/{name}"


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn an error of the hub's client into one line."""
    try:
        with quiet_hub_client():
            yield
    except HfHubHTTPError as error:
        code = error.response.status_code
        if code == 401:
            raise InputError(
                "push_to_hub: the hub does not accept the token; run `hf auth login`"
            ) from None
        if code == 403:
            raise InputError(
                f"push_to_hub: the token may not write to {name}; it needs the permission to write"
            ) from None
        raise RunError(f"push_to_hub: {name}: {_line(error)}") from error
    except Exception as error:  # of the client's HTTP library, of its upload library, or offline
        raise RunError(
            f"push_to_hub: {constants.ENDPOINT} cannot be reached: {_line(error)}; the same "
            "command tries again"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
