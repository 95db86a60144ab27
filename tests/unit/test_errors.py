"""Errors are one line, whatever the names in them hold."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as values

import shorttail as st
from shorttail.errors import BY_CODE, NotFound, from_code


@given(values.sampled_from(sorted(BY_CODE)), values.text())
def test_a_message_is_one_printable_line_and_arrives_as_it_left(code, text):
    error = from_code(code, text)
    assert error.message.isprintable()
    assert from_code(error.code, error.message).message == error.message == pickle.loads(pickle.dumps(error)).message
    assert str(error) == error.message or not text


@given(values.text(values.characters(codec="utf-8", categories=["L", "N", "P", "S"])))
def test_what_is_printable_stays_as_it_is(text):
    assert str(NotFound(text)) == text


def test_a_name_that_would_clear_the_screen_is_shown(tmp_path):
    with st.Engine.open(tmp_path / "store", create=True) as engine, pytest.raises(NotFound) as raised:
        engine.predict("no\n\x1b[2Jsuch", {"id": 1})
    assert r"'no\n\x1b[2Jsuch'" in raised.value.message
