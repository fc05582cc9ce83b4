"""The megatron-core versions that the tests have seen; what differs between them, each patch says of itself."""

from __future__ import annotations

import logging
from importlib.metadata import version

TESTED = ("0.16.1", "0.19.2")


def installed() -> str:
    return version("megatron-core")


def warn_if_untested() -> None:
    if installed() not in TESTED:
        logging.getLogger(__name__).warning(
            "megatron-core %s is untested here (tested: %s): run the layout tests before you trust it",
            installed(),
            ", ".join(TESTED),
        )
