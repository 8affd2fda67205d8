"""The page of ``bench/report.py``: ``load`` reads files, ``sections`` says what stands where, ``page`` writes it."""
