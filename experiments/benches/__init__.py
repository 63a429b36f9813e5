"""One benchmark a file: `run(harness) -> {row: {figure: value}}`."""

import os
from collections.abc import Callable


def uncompiled(fn: Callable[[], object]) -> Callable[[], object]:
    """fn by torch's own operations, without what a CPU runs from C."""

    def run() -> object:
        before = os.environ.get("MBRL_COMPILE")
        os.environ["MBRL_COMPILE"] = "0"
        try:
            return fn()
        finally:
            os.environ.pop("MBRL_COMPILE")
            if before is not None:
                os.environ["MBRL_COMPILE"] = before

    return run
