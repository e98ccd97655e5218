"""What is in a page, and what must not be."""

from html.parser import HTMLParser


class Reader(HTMLParser):
    """What a page has: tags with their attributes, and the text of elements by class."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.texts, self._open, self._skipped = [], [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag in ("script", "style"):
            self._skipped += 1
        if "s" in (attributes.get("class") or "").split():
            self.words.append("")
            self._open.append(0)
        elif self._open and tag not in ("br", "img", "meta"):
            self._open[-1] += 1

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._skipped -= 1
        if self._open:
            if self._open[-1] == 0:
                self._open.pop()
            else:
                self._open[-1] -= 1

    def handle_data(self, data):
        if self._open:
            self.words[-1] += data
        if not self._skipped:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def assert_asks_for_nothing(text, reader):
    for tag, attributes in reader.tags:
        for name in ("src", "href", "srcset", "poster", "data", "action", "background"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert tag not in ("iframe", "object", "embed", "base", "form", "audio", "video")
    assert "url(" not in text and "@import" not in text
    (policy,) = [a["content"] for t, a in reader.tags if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src data:;")
