"""Tables for a terminal."""

from loadtest.tables import columns, pairs


def test_columns_are_as_wide_as_their_widest_cell_and_markdown_too() -> None:
    assert columns(["what", "ms"], [["a", "1.00"], ["longer", "2"]]) == [
        "| what   |   ms |",
        "| ------ | ---: |",
        "| a      | 1.00 |",
        "| longer |    2 |",
    ]


def test_a_pair_is_a_name_and_its_value() -> None:
    assert pairs([("Failed requests", "0")]) == [f"{'Failed requests:':<40} {'0':>12}"]
