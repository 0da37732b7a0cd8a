"""Commands that answer what they are told to, one answer after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def scripted(directory: Path, name: str, answers: Sequence[str]) -> Path:
    """Put a command in `directory`; its calls are lines of ``directory/calls``.

    An answer is ``STATUS TEXT``; the text of a failure goes to standard error. The last one is given for ever. Returns
    the file of answers, which may be written anew.
    """
    file, command = directory / f"{name}.answers", directory / name
    file.write_text("".join(f"{answer}\n" for answer in answers))
    command.write_text(f"""#!/bin/sh
        echo "{name} $*" >> {directory}/calls
        read status text < {file}
        [ $(wc -l < {file}) -eq 1 ] || sed -i 1d {file}
        [ $status -eq 0 ] && echo "$text" || echo "$text" >&2
        exit $status""")
    command.chmod(0o755)
    return file
