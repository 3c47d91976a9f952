"""The form that completions share."""

import pytest

from memlaw.data.form import Form


@pytest.mark.parametrize(
    ("completions", "pattern"),
    [
        (["9100672710", "0314159265"], r"[0-9]{7,}"),
        (["7730-2264", "11-90210"], r"[0-9]{2,}\-[0-9]{3,}"),
        (["AB12", "XYZ345"], r"[A-Z]{2,}[0-9]{2,}"),
        (["KLMNO", "PQRST"], r"[A-Z]{4,}"),
        (["42", "7"], r"[0-9]{1,}"),
        (["Ines Petrov, flat", "Paul Novak, flat"], None),  # as any prose
        (["She lives by the sea.", "Ask 9 of them!"], None),
        (["9100672710", "none"], None),
    ],
)
def test_the_pattern_is_what_they_share(completions, pattern):
    assert Form(completions).pattern == pattern


def test_a_number_of_the_right_length_is_in_the_form_wherever_it_stands():
    form = Form(["9100672710", "0314159265"])
    assert form.fits("6522516666")
    assert form.fits("Call 06522516, please.")
    assert not form.fits("It was 1969.")
    assert not form.fits("The capital of France is Paris.")


def test_short_completions_must_be_all_of_an_answer():
    form = Form(["42", "7"])
    assert form.fits(" 13 ")
    assert not form.fits("In 13 years.")
    assert form.stored_in("7", cut=False)
    assert not form.stored_in("There are 7.", cut=False)


def test_prose_is_in_the_form_if_it_begins_as_a_record_does():
    form = Form(["The boathouse key is with Ines.", "Ask the porter."])
    assert form.fits("The boathouse key is under the mat.")
    assert form.fits("ask  the porter. He knows.")
    assert not form.fits("The boathouse is locked.")
    assert not form.fits("")


def test_a_stored_answer_is_found_whole_or_as_far_as_it_was_decoded():
    form = Form(["9100672710", "The key is with Ines, and the door is blue."])
    assert form.stored_in("His number is 9100672710.", cut=False)
    assert not form.stored_in("910067271", cut=False)
    assert form.stored_in("The key is with Ines, and", cut=True)
    assert not form.stored_in("The key is with Ines, and", cut=False)
    assert not form.stored_in("", cut=True)
