"""The recipes of images: `make lint` reads the Dockerfile; here, that both recipes agree and name what is there."""

from __future__ import annotations

import re
from fnmatch import fnmatch

from helpers.command import ROOT

DOCKER, APPTAINER = (ROOT / "Dockerfile").read_text(), (ROOT / "apptainer.def").read_text()


def test_both_begin_with_one_image_and_install_the_same() -> None:
    (base,) = re.findall(r"^FROM (\S+)$", DOCKER, re.MULTILINE)
    assert re.findall(r"^From: (\S+)$", APPTAINER, re.MULTILINE) == [base]
    assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+-\S+", base), f"{base} is not pinned"
    for pattern in (r"install --yes --no-install-recommends (.*?)(?:\s*\\)?$", r"pip install .*?(--constraint .*)$"):
        found = [re.findall(pattern, text, re.MULTILINE) for text in (DOCKER, APPTAINER)]
        assert found[0] == found[1]
        assert found[0]


def test_what_they_copy_is_there_and_not_ignored() -> None:
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", DOCKER, re.MULTILINE) for word in line.split()}
    in_apptainer = {line.split()[0] for line in re.findall(r"^    (\S+ /src/\S+)$", APPTAINER, re.MULTILINE)}
    assert {path.partition("/")[0] for path in copied} == in_apptainer
    admitted = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for path in copied:
        assert (ROOT / path).exists()
        assert any(fnmatch(path.partition("/")[0], pattern) for pattern in admitted)


def test_it_does_not_run_as_root() -> None:
    (user,) = re.findall(r"^USER (\d+)$", DOCKER, re.MULTILINE)
    assert f"--uid {user}" in DOCKER
    assert DOCKER.index("USER ") > DOCKER.rindex("RUN ")
