"""Tables of results are Markdown, and values of several seeds one text."""

from lighthubert_training.runs.tables import markdown_table, mean_and_deviation


def test_a_table_has_a_header_a_rule_and_its_rows():
    table = markdown_table(["model", "WER"], [["small", "3.1"], ["large", "2.9"]])
    assert table == "| model | WER |\n| --- | --- |\n| small | 3.1 |\n| large | 2.9 |"


def test_values_of_seeds_are_their_mean_and_deviation():
    values = [0.25, 0.23, 0.24]
    assert mean_and_deviation(values, 3) == "0.240 ± 0.010"
    assert mean_and_deviation(values, 1, scale=100) == "24.0 ± 1.0"


def test_one_value_stands_alone_and_none_is_empty():
    assert mean_and_deviation([0.256], 2) == "0.26"
    assert mean_and_deviation([], 2) == ""
