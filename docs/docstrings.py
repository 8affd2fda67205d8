"""For MkDocs: arguments that a docstring explains, one a line as ``name: what it is``, become a list."""

import re
from typing import Any

import griffe

# A line that begins with one name or several, and a colon.
ARGUMENT = re.compile(r"^([a-z]\w*(?:, [a-z]\w*)*): (?=\S)", re.MULTILINE)


class ArgumentLists(griffe.Extension):
    """Reads the docstrings of the reference."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each object that it has loaded."""
        if obj.docstring is not None:
            known = {parameter.name for parameter in getattr(obj, "parameters", ())} | set(obj.members)

            def as_item(found: re.Match[str]) -> str:
                return f"\n- **{found[1]}**: " if known.issuperset(found[1].split(", ")) else found[0]

            obj.docstring.value = ARGUMENT.sub(as_item, obj.docstring.value)
