"""Exchanges of a group's ranks on the host, in bounded time."""
