"""Times every dispatch and combine mode at a caller's shape and routing, here and now, and picks the fastest pair."""

from sonic_ep.profiler.agreement import WrongResultError
from sonic_ep.profiler.profiler import NetworkProfiler, default_device
from sonic_ep.profiler.report import ProfileReport

__all__ = ["NetworkProfiler", "ProfileReport", "WrongResultError", "default_device"]
