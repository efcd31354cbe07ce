"""Running actions: the public calls."""

from .executor import ActionExecutor, ActionHandle

__all__ = ["ActionExecutor", "ActionHandle"]
