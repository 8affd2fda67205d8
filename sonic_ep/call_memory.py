"""What calls have in common that differ in no more than values, addresses and numbers of tokens."""

from typing import Any


class CallRecord:
    """What is known of all calls with the same facts. plan: what a backend keeps here for the next of them, or None."""

    __slots__ = ("plan",)

    def __init__(self) -> None:
        self.plan: Any = None
