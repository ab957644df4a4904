"""Check that the packages of extras are installed, without importing them."""

import re
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from redi.engine.errors import InputError


def check_installed(package: str, key: str) -> None:
    """Raise InputError unless the package of the extra with its name is installed.

    Args:
        package: its module, and the extra.
        key: option that needs it, for the message.
    """
    if find_spec(package) is None:
        raise InputError(f"{key}: {package} is not installed: pip install 'redi-engine[{package}]'")


def missing_packages() -> str:
    """One line with the missing packages and how to install them; empty if none is missing.

    A checkout on the path that is not installed has no metadata to check.
    """
    try:
        requirements = requires("redi-engine") or []
    except PackageNotFoundError:
        return ""
    missing = []
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        if name and requirement.endswith('extra == "engine"'):
            try:
                version(name[0])
            except PackageNotFoundError:
                missing.append(name[0])
    if not missing:
        return ""
    return f"not installed: {', '.join(missing)}; pip install 'redi-engine[engine]'"
