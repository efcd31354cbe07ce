"""A minimal SDK for the Zamp platform: ``await ActionExecutor.execute(name, params)``; standard library only."""

import sys

# The build reads it here too. The label after the + tells this package from the official SDK's version of that number.
__version__ = "1.2.0+stdlib"

# No installer has checked this for a vendored copy or a layer. An older Python must be able to read this file.
if sys.version_info < (3, 9):  # noqa: UP036  # it is how the others learn of it
    sentence = "zamp_sdk needs Python 3.9 or later; this is %d.%d"
    raise ImportError(sentence % sys.version_info[:2])

from .action_executor import ActionExecutor, ActionHandle
from .action_executor.models import ActionStatus, RetryPolicy, SdkConfig
from .errors import ActionFailedError, ActionTimeoutError, HttpClientError, MissingConfigError, ZampError

__all__ = [
    "ActionExecutor",
    "ActionFailedError",
    "ActionHandle",
    "ActionStatus",
    "ActionTimeoutError",
    "HttpClientError",
    "MissingConfigError",
    "RetryPolicy",
    "SdkConfig",
    "ZampError",
    "__version__",
]
