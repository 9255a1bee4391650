"""Item files: titles and attributes whatever the format, and errors that carry the remedy."""

from __future__ import annotations

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import MOVIELENS
from log_files import text_log

from dman_runtime.data.interactions import ItemInfo
from dman_runtime.data.items import read_items
from dman_runtime.errors import InputError


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".parquet"])
def test_items_have_titles_and_the_other_columns_as_attributes(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"items{kind}"
    if kind == ".parquet":
        table = {"item_id": [2, 1], "title": ["Up, up", None], "year": [2009, None], "genres": [["a", "b"], []]}
        pq.write_table(pa.table(table), path)
    else:
        lines = ["item_id,title,year,genres", "2,'Up, up',2009,a|b", "1,,,"]
        text = "\n".join(lines).replace(",", "\t" if kind == ".tsv" else ",").replace("'Up\t up'", "'Up, up'")
        path.write_text(text.replace("'", '"') + "\n")
    assert read_items(path) == {"2": ItemInfo("Up, up", {"year": "2009", "genres": "a|b"}), "1": ItemInfo("", {})}


def test_items_read_movielens_movies_in_latin_1(tmp_path: Path) -> None:
    path = tmp_path / "movies.dat"
    path.write_bytes("1::Toy Story (1995)::Animation|Comedy\r\n11::Misérables: Les\x85::Drama\n".encode("latin-1"))
    assert read_items(path) == {
        "1": ItemInfo("Toy Story (1995)", {"genres": "Animation|Comedy"}),
        "11": ItemInfo("Misérables: Les\x85", {"genres": "Drama"}),
    }


@pytest.mark.parametrize(
    ("name", "content", "cause", "remedy"),
    [
        ("items.csv", "id,title\n1,a\n", "no column 'item_id'; it has: id, title", "the column that holds the items"),
        ("items.csv", "item_id,name\n1,a\n", "no column 'title'", "rename the column that holds the titles to 'title'"),
        ("items.csv", "item_id,title\n1,a\n2,b\n1,c\n", "line 4: item '1' appears a second time", "keep one row"),
        ("items.csv", "item_id,title\n,a\n", "line 2: item_id '' is empty", "use ids of 1 to 400 bytes"),
        ("items.csv", "item_id,title\n", "no rows", "give a file"),
        (
            "movies.dat",
            "1::a::b\n2::c\n",
            "line 2 has 2 values instead of 3: '2::c'",
            "every line needs item::title::genres",
        ),
    ],
)
def test_bad_item_file_is_refused(tmp_path: Path, name: str, content: str, cause: str, remedy: str) -> None:
    with pytest.raises(InputError) as raised:
        read_items(text_log(tmp_path, content, name))
    assert cause in str(raised.value)
    assert remedy in str(raised.value)


def test_items_read_movielens_movies_in_utf8_too(tmp_path: Path) -> None:
    path = text_log(tmp_path, "1::Misérables: Les::Drama\n2::Up::\n", "movies.dat")
    assert read_items(path) == {"1": ItemInfo("Misérables: Les", {"genres": "Drama"}), "2": ItemInfo("Up", {})}


def test_items_say_that_a_file_is_read_as_latin_1(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "movies.dat").write_bytes("1::é::Drama\n".encode("latin-1"))
    assert read_items(tmp_path / "movies.dat")["1"].title == "é"
    assert "movies.dat is not UTF-8: it is read as Latin-1" in caplog.text


def test_items_come_from_json_lines_and_folders(tmp_path: Path) -> None:
    text_log(tmp_path, '{"item_id": 7, "title": "Up", "year": 2009}\n', "part-1.json")
    text_log(tmp_path, '{"item_id": 8, "title": null}\n', "part-2.json")
    assert read_items(tmp_path) == {"7": ItemInfo("Up", {"year": "2009"}), "8": ItemInfo("", {})}


def test_blanks_around_item_ids_are_taken_off(tmp_path: Path) -> None:
    assert list(read_items(text_log(tmp_path, "item_id,title\n a ,x\n"))) == ["a"]
    with pytest.raises(InputError, match="line 3: item 'a' appears a second time"):
        read_items(text_log(tmp_path, "item_id,title\n a ,x\na,y\n"))


@pytest.mark.parametrize("values", [[1.5], [True]])
def test_items_whose_ids_are_no_ids_are_refused(tmp_path: Path, values: list[object]) -> None:
    pq.write_table(pa.table({"item_id": values, "title": ["x"]}), tmp_path / "items.parquet")
    with pytest.raises(InputError, match="column 'item_id' has type"):
        read_items(tmp_path / "items.parquet")


@pytest.mark.skipif(not MOVIELENS.is_dir(), reason="MovieLens-1M is not here")
def test_movielens_items_have_their_titles() -> None:
    items = read_items(MOVIELENS / "items.csv")
    assert len(items) == 3883
    assert items["2"] == ItemInfo("Jumanji (1995)", {"genres": "Adventure|Children's|Fantasy"})


@pytest.mark.parametrize("column", ["item_id", "movieId", "asin"])
def test_item_column_may_have_another_known_name_than_in_the_log(
    tmp_path: Path, column: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "items.csv"
    path.write_text(f"{column},title\n7,Seven\n")
    assert read_items(path, item_column="itemid")["7"].title == "Seven"
    assert f"has no column 'itemid': '{column}' is taken for the items" in caplog.text
