"""Whether the packages of the extra `engine` are installed. It imports none of them."""

import re
from importlib.metadata import PackageNotFoundError, requires, version


def missing_packages() -> str:
    """One line that names the packages and the command that installs them; empty: all are there."""
    missing = []
    for requirement in requires("redi-engine") or []:
        name = re.match(r"[\w.-]+", requirement)
        if name and requirement.endswith('extra == "engine"'):
            try:
                version(name[0])
            except PackageNotFoundError:
                missing.append(name[0])
    if not missing:
        return ""
    return f"not installed: {', '.join(missing)}; pip install 'redi-engine[engine]'"
