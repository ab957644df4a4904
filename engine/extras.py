"""Check that the packages of the extra `engine` are installed, without importing them."""

import re
from importlib.metadata import PackageNotFoundError, requires, version


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
