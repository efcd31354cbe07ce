"""A minimal SDK for the Zamp platform: ``await ActionExecutor.execute(name, params)``; standard library only."""

from .action_executor import ActionExecutor, ActionHandle
from .action_executor.http_client import __version__
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
