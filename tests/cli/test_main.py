import io
import os
import sys

import pytest

import fastrl
from fastrl.cli import info, main
from fastrl.cli.training.run_folder import write_atomically


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("command", ["info", "train --help"])  # the second fills a buffer
def test_a_reader_that_has_gone_is_no_traceback(monkeypatch, capsys, closed, command):
    """As in `fastrl info | head -1`."""
    reader, writer = os.pipe()
    if closed:
        os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main.main(command.split()) == (1 if closed else 0)
    assert capsys.readouterr().err == ""


def test_a_full_disk_is_an_error_with_a_message(monkeypatch, capsys):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert main.main(["info"]) == 1
    assert "expected to read and write what it needs, got [Errno 28]" in capsys.readouterr().err


def test_a_terminal_that_cannot_show_a_text_shows_the_rest(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(info, "versions", lambda: [("fastrl", "1 ± 0")])
    assert main.main(["info"]) == 0
    assert b"1 ? 0" in stream.buffer.getvalue()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (
            "rich.console",
            'fastrl info: expected the package rich, got none. pip install "fastrl[tr',
        ),
        (
            "rouge_score",
            'expected the package rouge-score, got none. pip install "fastrl[metrics]"',
        ),
        ("elsewhere", None),
        (None, "hf: expected transformers"),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch, capsys, missing, message):
    def command(argv):
        raise ImportError(message or "No module", name=missing)

    monkeypatch.setattr(info, "main", command)
    monkeypatch.setitem(sys.modules, (missing or "").partition(".")[0], None)  # as if not there
    if message is None:
        with pytest.raises(ImportError):
            main.main(["info"])
    else:
        assert main.main(["info"]) == 2
        assert message in capsys.readouterr().err


def test_what_a_package_lacks_is_not_the_package(monkeypatch):
    def command(argv):
        from torch import a_name_of_another_version  # noqa: F401

    monkeypatch.setattr(info, "main", command)
    monkeypatch.setitem(info.OPTIONAL, "hf", ("torch",))
    with pytest.raises(ImportError, match="a_name_of_another_version"):
        main.main(["info"])


def test_version(capsys):
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastrl {fastrl.__version__}\n"


def test_a_pipe_is_written_to_and_a_link_stays_one(tmp_path):
    """A device is one of these: what root writes to /dev/stdout has to leave it there."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(tmp_path / "pipe", b"page")
    assert os.read(reader, 9) == b"page"
    os.close(reader)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_atomically(tmp_path / "link", b"page")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"page"
