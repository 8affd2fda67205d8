"""Results as one page: ``python -m sonic_ep report results/*.json -o report.html``.

``load`` reads and checks the JSON documents, ``documents`` holds them. ``selection``, ``computed`` and ``spread`` take
from them what a section shows; ``charts`` and ``grids`` draw it, ``sections`` and ``tables`` put it into words, and
``page`` writes the HTML and the PNGs. matplotlib is imported when the first figure is drawn, not before.
"""
