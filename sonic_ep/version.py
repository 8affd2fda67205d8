"""The version, in one place: also read while the package is built, when torch may not be installed."""

__version__ = "0.4.0"
