import pytest

from nodelens.report import document
from nodelens.report.document import Document


def test_a_page_keeps_its_data_until_the_next_one_is_written(tmp_path, monkeypatch):
    first = Document(tmp_path / "report.html", "cdn")
    first.embed("old", 1, on_demand=True)
    first.write(["first"])
    second, write = Document(tmp_path / "report.html", "cdn"), document.write_text
    second.embed("new", 2, on_demand=True)

    def full(path, words):
        if path.suffix == ".html":
            raise OSError("no space left on device")
        write(path, words)

    monkeypatch.setattr(document, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        second.write(["second"])
    assert "first" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "report_files/old.js").is_file()
    monkeypatch.undo()
    second.write(["second"])
    assert [file.name for file in (tmp_path / "report_files").iterdir()] == ["new.js"]
