"""``@promise("bits")`` marks a test that keeps a promise of docs/guarantees.md, which names it by the same word."""

import pytest

promise = pytest.mark.promise
