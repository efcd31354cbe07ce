"""The import path that the official SDK documents for HttpClientError."""

from ..errors import HttpClientError

__all__ = ["HttpClientError"]
