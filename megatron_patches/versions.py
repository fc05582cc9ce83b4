"""The megatron-core versions that the tests have seen, and the one place for what differs between them."""

from __future__ import annotations

import logging
from importlib.metadata import version

TESTED = ("0.16.1",)


def warn_if_untested() -> None:
    installed = version("megatron-core")
    if installed not in TESTED:
        logging.getLogger(__name__).warning(
            "megatron-core %s is untested here (tested: %s): run the layout tests before you trust it",
            installed,
            ", ".join(TESTED),
        )
