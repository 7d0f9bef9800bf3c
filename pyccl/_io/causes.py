"""Why a connection failed. Trio wraps the errors of several addresses of one name in an OSError around a group."""

from __future__ import annotations


def causes_of(error: BaseException) -> tuple[BaseException, ...]:
    """The errors at the bottom: one for each address that was tried, or the error itself."""
    cause = error.__cause__ or error
    if not isinstance(cause, BaseExceptionGroup):
        return (cause,)
    return tuple(deeper for each in cause.exceptions for deeper in causes_of(each))


def reason_of(error: BaseException) -> str:
    """The first of them in the system's words."""
    cause = causes_of(error)[0]
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
