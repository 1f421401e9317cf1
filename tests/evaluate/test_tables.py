"""Lines from JSONL, CSV and parquet files."""

import json
import sys

import pytest

from jaxengine.errors import ConfigError, RequestError
from jaxengine.evaluate.tables import count_lines, read_lines

PROMPTS = ["one", 'two "quoted"\nlines', "drei, é"]


def rows(path, column="text", id_column=None, url="/v1/completions"):
    return list(read_lines(path, column, id_column, url))


def test_jsonl(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"custom_id": "a"}\n\n[1]\nnot json\n\xff\n{"custom_id": "b"}')
    lines = list(read_lines(path, None, None, ""))
    assert (lines[0], lines[1], lines[5]) == ({"custom_id": "a"}, {}, {"custom_id": "b"})
    assert all(isinstance(line, RequestError) for line in lines[2:5])
    assert "is not an object" in str(lines[2]) and "not valid JSON" in str(lines[3])
    assert count_lines(path) == 6
    for given in (("x", None, None), (None, "x", None), (None, None, "/v1/score")):
        with pytest.raises(ConfigError, match="columns and url are of"):
            read_lines(path, *given)
    with pytest.raises(ConfigError, match="there is no such file"):
        rows(tmp_path / "other.jsonl", None)


def test_lines_that_only_look_like_json(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("[" * 100_000 + "\n" + "1" * 5000 + "\n")
    lines = list(read_lines(path, None, None, ""))
    assert len(lines) == 2 and all(isinstance(line, RequestError) for line in lines)


def test_a_table_that_is_no_text(tmp_path):
    path = tmp_path / "in.csv"
    path.write_bytes(b"text\none\n\xff\n")
    with pytest.raises(ConfigError, match=r"in\.csv: line \d+ cannot be read: .*utf-8"):
        rows(path)


def test_files_are_read_as_they_are_needed(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"custom_id": "a"}) + "\n" + "x" * 1_000_000)
    lines = read_lines(path, None, None, "")
    assert next(lines) == {"custom_id": "a"}
    path.unlink()
    lines.close()


def write_csv(path):
    import csv

    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        writer.writerows([[f"q{i}", text] for i, text in enumerate(PROMPTS)])


def write_parquet(path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = {"id": [f"q{i}" for i in range(3)], "text": PROMPTS, "other": [1, 2, 3]}
    parquet.write_table(pyarrow.table(table), path)


@pytest.mark.parametrize(("suffix", "write"), [("csv", write_csv), ("parquet", write_parquet)])
def test_columns(tmp_path, suffix, write):
    path = tmp_path / f"in.{suffix}"
    write(path)
    assert [line["body"]["prompt"] for line in rows(path)] == PROMPTS
    assert [line["custom_id"] for line in rows(path)] == ["row-0", "row-1", "row-2"]
    assert [line["custom_id"] for line in rows(path, id_column="id")] == ["q0", "q1", "q2"]
    chat = rows(path, url="/v1/chat/completions")
    assert chat[1] == {
        "custom_id": "row-1", "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": PROMPTS[1]}]},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="has no column 'nonsense'; it has"):
        rows(path, "nonsense")
    with pytest.raises(ConfigError, match="name the column with the prompts"):
        rows(path, None)
    assert count_lines(path) == (3 if suffix == "parquet" else None)


def test_parquet_without_its_reader(tmp_path, monkeypatch):
    path = tmp_path / "in.parquet"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match="parquet files need pyarrow: pip install pyarrow"):
        rows(path)
