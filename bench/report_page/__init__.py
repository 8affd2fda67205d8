"""The page of ``bench/report.py``: read by ``load``, chosen by ``selection`` and ``computed``, drawn by the others."""
