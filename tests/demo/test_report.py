"""The demo's report stands alone, shows exactly what was generated, and says in its headline what was not won."""

import re
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from lin_jax.data import Tokenizer
from lin_jax.decoding import TokenOrigin
from lin_jax.demo.figures import build_report
from lin_jax.demo.report import choose_samples, coloured_spans, visible, write_report
from lin_jax.demo.runs import AUGMENTED, BARE, BEST

HOSTILE = "</script></pre><script>alert('1')</script> &amp; <b>\x00\x07\x7f\x85\r über 你好 🎉\tend"
VOID = {"meta", "link", "br"}
ABOUT = {
    "teacher": "A small softmax Transformer was trained on <b>text</b>",
    "text": "text",
    "cpu": "cpu, AVX2, 2 processors",
    "prompts": 3,
    "new_tokens_per_prompt": 192,
    "rounds": 5,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([Path(__file__).read_text(encoding="utf-8")], 320)


def sample(tokenizer: Tokenizer, prompt: str, text: str, *, drafts: bool = True) -> dict[str, Any]:
    """As if all but every third token came from drafts."""
    tokens = tokenizer.encode(text).tolist()
    drafted = [TokenOrigin.DRAFT if drafts and (place + 1) % 3 else TokenOrigin.TARGET for place in range(len(tokens))]
    return {"prompt": tokenizer.encode(prompt).tolist(), "tokens": tokens, "origins": list(map(int, drafted))}


def model(ratio: float) -> dict[str, Any]:
    interval = [ratio - 0.01, ratio + 0.01]
    return {"perplexity": 20 * ratio, "ratio": ratio, "interval": interval, "attention": "a", "state_bytes": 4096}


def drafter(speedup: float, *, share: float = 0.6, equal: int = 3) -> dict[str, Any]:
    return {
        "tokens_per_second": 100 * speedup,
        "speedup": speedup if share else 1.0,
        "tokens_per_step": 2.4,
        "drafted_share": share,
        "prompts_equal_greedy": equal,
        "prompts_equal_sampled": 3,
        "rounding_ties": 0,
        "steps_by_tree": {"none": 3, "chain:3": 9},
    }


def results(tokenizer: Tokenizer, drafts: float = 1.5, **changes: Any) -> dict[str, Any]:
    """Results of the parts, everything won: `share`, `equal`, `ratios` (bare, augmented, best, window), `softmax`."""
    bare, augmented, best, window = changes.get("ratios", (1.3, 1.2, 1.02, 1.1))
    share = changes.get("share", 0.6)
    texts = (("<i>prompt</i>", HOSTILE), ("x = 1\n", "def main():\n    return 0\n"), ("import re", "aaaa" * 9))
    found = {"ngram": drafter(drafts, share=share, equal=changes.get("equal", 3))}
    return {
        "quality": {
            "teacher": model(1.0),
            "students": {BARE: model(bare), AUGMENTED: model(augmented), BEST: model(best)},
            "baselines": {"window of 64, untrained": model(window)},
            "tokens": 4096,
            "rows": 16,
            "row_length": 256,
        },
        "decoding": {
            "softmax_tokens_per_second": changes.get("softmax", 60.0),
            "plain_tokens_per_second": 100.0,
            "best_drafter": "ngram" if share else "plain",
            "drafters": found,
            "state_bytes": 4096,
            "softmax_state_bytes": 9000,
            "samples": [sample(tokenizer, *each, drafts=bool(share)) for each in texts],
        },
        "context": {
            "lengths": [256, 16384],
            "linear": {"milliseconds": [1.0, 1.0], "state_bytes": [4096, 4096]},
            "softmax": {"milliseconds": [1.0, changes.get("long", 8.0)], "state_bytes": [9000, 500_000]},
        },
    }


def report_of(tokenizer: Tokenizer, **changes: Any) -> dict[str, Any]:
    return build_report(results(tokenizer, **changes), {"teacher": 200.0, "decoding": 40.0}, ABOUT)


def page_of(tmp_path: Path, tokenizer: Tokenizer, **changes: Any) -> str:
    path = tmp_path / "runs" / "report.html"
    path.parent.mkdir(exist_ok=True)
    write_report(path, report_of(tokenizer, **changes), tokenizer)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> str:
    """The page of a demo that has won everything."""
    return page_of(tmp_path_factory.mktemp("report"), tokenizer)


class Balance(HTMLParser):
    """Fails where a tag is closed that is not the innermost open one."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_stands_alone(page):
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "://" not in without_namespaces
    assert not re.search(r'@import|(?:src|href)="(?!#)|url\((?!#)', without_namespaces)
    assert "pytest-" not in page


def test_tags_are_balanced_and_hostile_text_is_text(page):
    balance = Balance()
    balance.feed(page)
    assert not balance.open
    assert not balance.seen & {"script", "b", "i"}
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)


def test_shows_exactly_the_generated_text(page):
    shown = re.findall(r"<article.*?<pre>(.*?)</pre>", page, flags=re.DOTALL)
    kinds = [re.findall(r'<span class="(\w+)">(.*?)</span>', each, flags=re.DOTALL) for each in shown]
    texts = [unescape("".join(text for _, text in spans)) for spans in kinds]
    assert texts == ["<i>prompt</i>" + visible(HOSTILE), "x = 1\ndef main():\n    return 0\n", "import re" + "aaaa" * 9]
    assert all(spans[0][0] == "prompt" for spans in kinds)
    assert all("draft" in {kind for kind, _ in spans} for spans in kinds)


def test_spans_follow_origins_and_join_neighbours(tokenizer):
    prompt, tokens = tokenizer.encode("ab").tolist(), tokenizer.encode("return 0; 你 import 🎉").tolist()
    target, draft = TokenOrigin.TARGET, TokenOrigin.DRAFT
    origins = [target, *[draft] * (len(tokens) - 1)]
    spans = coloured_spans(tokenizer, prompt, tokens, origins)
    assert [kind for kind, _ in spans] == ["prompt", "target", "draft"]
    assert spans[1][1] == tokenizer.decode(tokens[:1])
    mixed = coloured_spans(
        tokenizer, prompt, tokens, [target, draft] * (len(tokens) // 2) + [target] * (len(tokens) % 2)
    )
    assert "".join(text for _, text in mixed) == "abreturn 0; 你 import 🎉"
    assert all(one[0] != other[0] for one, other in pairwise(mixed))


def test_text_that_ends_inside_a_character(tokenizer):
    tokens = tokenizer.encode("a𝄞").tolist()[:-1]
    spans = coloured_spans(tokenizer, tokens[:1], tokens[1:], [TokenOrigin.DRAFT] * (len(tokens) - 1))
    assert "".join(text for _, text in spans) == tokenizer.decode(tokens)
    assert coloured_spans(tokenizer, [], [], []) == []


def test_prefers_text_that_repeats_itself_least(tokenizer):
    texts = ["aaaa" * 9, "def main(): return 0", "0000000000000000", "import re, html"]
    samples = choose_samples(tokenizer, [sample(tokenizer, "x", text) for text in texts], count=2)
    assert [each.number for each in samples] == [2, 4]
    assert samples[0].drafted == pytest.approx(2 / 3, abs=0.05)


def test_charts_are_xml_with_ids_of_their_own(page):
    drawings = re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)
    # Two widths of the charts of quality and of speed; time and state over the length of a text.
    assert len(drawings) == 6
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert not re.search(r"#0000|<style|<metadata|font-family", drawing)
        assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', drawing)) <= set(re.findall(r'\bid="([^"]+)"', drawing))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_same_figures_give_the_same_page(tmp_path, tokenizer, page):
    assert page_of(tmp_path, tokenizer) == page


def test_a_headline_of_what_was_won(tokenizer, page):
    report = report_of(tokenizer)
    assert report["headline"] == (
        f"{BEST} loses 2.0% of perplexity against its teacher; drafts bring the same text 1.50 times as fast"
    )
    assert report["lossless"] is True
    assert all(each["won"] for each in report["findings"])
    assert report["seconds"] == {"teacher": 200.0, "decoding": 40.0, "total": 240.0}
    assert "not won" not in page
    assert "Same text: yes" in page


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"equal": 2}, "drafts changed the text"),
        ({"share": 0.0}, "no draft was worth a try, and decoding is no faster"),
        ({"drafts": 0.8}, "the same text, slower on this machine (0.80 times as fast)"),
        ({"drafts": 1.01}, "the same text, no faster on this machine"),
        ({"ratios": (1.3, 1.2, 1.25, 1.3)}, f"{BEST} loses 25.0% of perplexity"),
        ({"ratios": (1.2, 1.3, 1.02, 1.1)}, "Not won: the augmented attention is no nearer to the teacher"),
        ({"ratios": (1.3, 1.2, 1.02, 1.01)}, "Not won: the trained memory is no better than the window alone"),
        ({"softmax": 300.0}, "Not won: the linear model decodes short texts no faster than its softmax teacher"),
        ({"long": 0.5}, "Not won: after 16,384 tokens the linear model is no faster"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:24],
)
def test_what_was_not_won_is_in_the_headline(tokenizer, changes, said):
    report = report_of(tokenizer, **changes)
    assert said in report["headline"]
    assert sum(not each["won"] for each in report["findings"]) == 1


def test_nothing_drafted_is_no_speedup(tmp_path, tokenizer):
    """Whatever the clock said."""
    report = report_of(tokenizer, drafts=1.07, share=0.0)
    assert (report["speedup"], report["best_drafter"]) == (1.0, "plain")
    assert report["speculative_tokens_per_second"] == report["plain_tokens_per_second"]
    page = page_of(tmp_path, tokenizer, drafts=1.07, share=0.0)
    assert "nothing was drafted" in page
    assert "(plain: no draft was worth a try)" in page
    assert 'class="draft"' not in page.split("<article", 1)[1]


def test_a_changed_text_is_said(tmp_path, tokenizer):
    page = page_of(tmp_path, tokenizer, equal=2, long=0.5)
    assert report_of(tokenizer, equal=2)["lossless"] is False
    assert "Same text: no" in page
    assert "drafts changed the text.</h1>" in page
    assert page.count(">not won<") == 1


def test_a_student_better_than_its_teacher(tokenizer):
    report = report_of(tokenizer, ratios=(1.3, 1.2, 0.98, 1.1))
    assert report["headline"].startswith(f"{BEST} has a perplexity 2.0% below its teacher's")


def test_no_long_texts(tmp_path, tokenizer):
    """Where nothing long was measured nothing is said or drawn of it; where softmax was left out, neither."""
    parts = results(tokenizer)
    parts["context"]["softmax"] = {"milliseconds": [1.0, None], "state_bytes": [9000, None]}
    report = build_report(parts, {}, ABOUT)
    assert any("after 256 tokens" in each["text"] for each in report["findings"])
    empty = {"milliseconds": [], "state_bytes": []}
    report = build_report({**parts, "context": {"lengths": [], "linear": empty, "softmax": empty}}, {}, ABOUT)
    path = tmp_path / "report.html"
    write_report(path, report, tokenizer)
    assert "Long texts" not in path.read_text(encoding="utf-8")
