"""Whatever is wrong with a foreign file is one error that names it; mistakes of ours stay what they are."""

import pytest

from reasonscope.data.errors import InputError, StoreError
from reasonscope.data.storage.untrusted import check_fields, json_lines, parse_json, parse_yaml, wrap_errors


@pytest.mark.parametrize("raw", ['{"a": [1, null]}', b'{"a": [1, null]}'])
def test_json_is_read(raw):
    assert parse_json(raw, "x") == {"a": [1, None]}


def test_a_whole_surrogate_pair_is_a_character():
    assert parse_json(r'"\ud83d\ude00"', "x") == "\N{GRINNING FACE}"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("{", "x: not JSON"),
        (b"\xff", "x: not JSON"),
        ("[" * 100_000, "x: not JSON"),
        (r'"\ud83d"', "x: a text holds half a surrogate pair"),
        (rb'{"a": "\uDE00"}', "x: a text holds half a surrogate pair"),
    ],
)
def test_invalid_json_is_named(raw, message):
    with pytest.raises(InputError, match=message):
        parse_json(raw, "x")


@pytest.mark.parametrize(
    "error", [KeyError("a"), TypeError("b"), OSError("c"), UnicodeDecodeError("utf-8", b"", 0, 1, "d")]
)
def test_a_file_that_is_taken_apart_in_vain_is_damaged(error):
    with pytest.raises(InputError, match="the file x is damaged.*" + type(error).__name__), wrap_errors("the file x"):
        raise error
    with pytest.raises(StoreError, match="the file x is damaged"), wrap_errors("the file x", StoreError):
        raise error


def test_errors_of_ours_pass_as_they_are_or_become_the_kind_asked_for():
    for raised, asked, seen in (
        (InputError, InputError, "^y$"),
        (StoreError, InputError, "^y$"),
        (StoreError, StoreError, "^y$"),
    ):
        with pytest.raises(raised, match=seen), wrap_errors("x", asked):
            raise raised("y")
    with pytest.raises(StoreError, match=r"^x: y$"), wrap_errors("x", StoreError):
        raise InputError("y")
    with pytest.raises(AssertionError), wrap_errors("x"):
        raise AssertionError


def test_fields_have_their_type_and_a_bool_is_not_a_number():
    check_fields({"n": 1, "b": True, "more": None}, {"n": int, "b": bool}, "x")
    for values in ({}, {"n": "1", "b": True}, {"n": True, "b": True}, {"n": 1, "b": 1}):
        with pytest.raises(InputError, match=r"x is damaged: its [nb] must be"):
            check_fields(values, {"n": int, "b": bool}, "x")


def test_lines_are_read_with_the_places_to_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n \n2\r\n{\n', encoding="utf-8")
    lines = json_lines(path)
    assert [next(lines), next(lines)] == [(f"{path}, line 1", {"a": 1}), (f"{path}, line 3", 2)]
    with pytest.raises(InputError, match="line 4: not JSON"):
        next(lines)
    with pytest.raises(InputError, match="cannot be read"):
        next(json_lines(tmp_path))


def test_yaml_is_read_without_aliases_and_objects():
    assert parse_yaml("a: [1, {b: null}]", "plan.yaml") == {"a": [1, {"b": None}]}
    for wrong, said in (
        ("a: &x [1]\nb: *x", "the alias"),
        ("a: !!python/name:os.system", "python/name"),
        ("a: [", "flow"),
    ):
        with pytest.raises(InputError, match=f"(?s)cannot read the plan plan.yaml: .*{said}"):
            parse_yaml(wrong, "plan.yaml")
