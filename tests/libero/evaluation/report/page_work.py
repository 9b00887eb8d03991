"""Pages, read as a browser would read them."""

from html.parser import HTMLParser
from xml.etree import ElementTree


class PageReader(HTMLParser):
    """HTML, every tag of which is closed in order, as a tree."""

    def __init__(self):
        super().__init__()
        self.builder, self.open = ElementTree.TreeBuilder(), []

    def handle_starttag(self, tag, attributes):
        self.builder.start(tag, {name: value or "" for name, value in attributes})
        if tag in ("meta", "img", "br"):
            self.builder.data("\n" if tag == "br" else "")
            self.builder.end(tag)
        else:
            self.open.append(tag)

    def handle_data(self, data):
        if self.open:
            self.builder.data(data)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.builder.end(tag)


def parse_page(html: str) -> ElementTree.Element:
    """The page as a tree; every tag of it is closed in order, else this fails."""
    reader = PageReader()
    reader.feed(html)
    reader.close()
    assert not reader.open
    return reader.builder.close()


def words_of(element) -> str:
    return "".join(element.itertext())


def section_of(page, anchor):
    """The part of a page that a link to it leads to; None if it has none."""
    return next((section for section in page.iter("section") if section.get("id") == anchor), None)


def cells_of(section):
    """Words of each cell in each row; what is small, after a line break."""
    for small in section.iter("small"):
        small.text = f"\n{small.text}"
    return [[words_of(cell) for cell in row] for row in section.iter("tr")]
