"""What all pages are made of: templates that escape words and miss nothing, and their shared parts."""

import json

import pytest
from jinja2 import TemplateNotFound, UndefinedError
from page_work import parse_page, words_of

from worldvla_libero.pages import page as pages
from worldvla_libero.pages.page import Cell, Table, differences, render

HOSTILE = "<script>alert(\"1\")</script> & 'it' {{ name }} {% raw %}"


def fill(text, **values):
    """Fill in a template that is given as text, as one in a file is."""
    return pages._environment(pages.__package__).from_string(text).render(values)


def part(name, value):
    """A shared part, within an element that holds it."""
    return fill(f'{{% import "pages/parts.html" as parts %}}<div>{{{{ parts.{name}(value) }}}}</div>', value=value)


def test_words_are_escaped_and_what_is_missing_is_an_error():
    element = parse_page(fill('<p title="{{ words }}">{{ words }}</p>', words=HOSTILE))
    assert (element.text, element.get("title")) == (HOSTILE, HOSTILE)
    for text in ("{{ absent }}", "{% if words.absent %}x{% endif %}", "{% for x in absent %}{% endfor %}"):
        with pytest.raises(UndefinedError, match="absent"):
            fill(text, words=HOSTILE)


def test_a_template_of_a_room_is_filled_in_whole_or_not_at_all():
    with pytest.raises(UndefinedError, match="is undefined"):
        render("worldvla_libero.data", "data.html", name="n")
    with pytest.raises(TemplateNotFound, match=r"report\.html"):
        render("worldvla_libero.data", "report.html", name="n")


def test_a_page_links_to_its_sections_but_those_that_are_empty():
    text = """{% extends "pages/page.html" %}{% set kicker = words %}
{% set body %}<p>{{ words }}</p>{% endset %}{% set empty %} {% endset %}
{% set sections = [("Where it fails", body), ("Nothing", empty), ("Words", words)] %}"""
    page = parse_page(fill(text, name=HOSTILE, words=HOSTILE))
    assert [a.get("href") for a in page.find(".//nav")] == ["#where-it-fails", "#words"]
    assert [section.get("id") for section in page.iter("section")] == ["where-it-fails", "words"]
    assert [words_of(h2) for h2 in page.iter("h2")] == ["Where it fails", "Words"]
    assert words_of(page.find(".//section/p")) == words_of(page.find(".//h1")) == HOSTILE
    assert words_of(page.find("head/title")) == HOSTILE
    assert not list(page.iter("script"))


def test_cells_say_no_more_than_they_hold():
    cells = ["word", Cell("1"), Cell("2", small="two"), Cell("3", alarm="3!"), Cell(HOSTILE, published=True)]
    html = part("numbers", Table("title", cells, [cells, cells], opened=True))
    element = parse_page(html)
    inside = ["word", "1", "2<small>two</small>", '3<small class="alarm">3!</small>']
    for tag, number in (("th", 1), ("td", 2)):
        found = list(element.iter(tag))
        assert len(found) == number * len(cells)
        assert [cell.get("class") for cell in found] == [None, "n", "n", "n", "n"] * number
        assert words_of(found[4].find("i")) == HOSTILE
    assert all(f">{cell}</td>" in html for cell in inside)
    assert "open" in element.find("details").attrib
    assert "open" not in parse_page(part("numbers", Table("title", cells, []))).find("details").attrib


@pytest.mark.parametrize("value", [None, True, 3, 0.5, [], {}, (), float("inf"), "", "null", HOSTILE])
def test_values_are_words_or_json(value):
    assert words_of(parse_page(part("values", value))) == (value if isinstance(value, str) else json.dumps(value))
    element = parse_page(part("values", {HOSTILE: [value, {"inside": value}]}))
    assert words_of(element.find("dl/div/dt")) == HOSTILE
    assert words_of(element.find("dl/div/dd/dl/div/dd")) == (
        value if isinstance(value, str) else json.dumps(value)
    )


def test_differences_name_runs_by_what_they_state():
    assert differences({"a": {"x": "1", "y": "2"}, "b": {"x": "1", "y": "<3>"}, "c": {"y": "2"}}) == [
        "Not all runs have the same y: 2 in a, c; <3> in b."
    ]
