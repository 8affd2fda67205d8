"""The page of ``bench/report.py``: ``load`` reads, ``selection`` and ``computed`` choose, ``figures`` and ``page`` draw."""
