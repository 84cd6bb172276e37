"""The report stands alone, shows exactly what was generated, and copes with whatever figures there are."""

import re
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from lin_jax.data import Tokenizer
from lin_jax.decoding import Generation, TokenOrigin
from lin_jax.decoding.autotune.plan import SpeculationPlan
from lin_jax.decoding.drafting.tree import DraftTree, tree_text
from lin_jax.demo.measure import DrafterFigures
from lin_jax.demo.report import choose_samples, coloured_spans, visible, write_report

HOSTILE = "</script></pre><script>alert('1')</script> &amp; <b>\x00\x07\x7f\x85\r über 你好 🎉\tend"
TREES = {
    "medusa": ((0,), (1,), (0, 0), (0, 1)),
    "ngram": ((0,), (0, 0), (0, 0, 0)),
    "medusa+ngram": ((0,), (10,), (0, 0), (10, 10), (10, 10, 10)),
}
VOID = {"meta", "link", "br"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([Path(__file__).read_text(encoding="utf-8")], 320)


def generation(tokens: list[int], drafted: int = 2) -> Generation:
    """As if all but every third token came from drafts."""
    origins = [TokenOrigin.DRAFT if (place + 1) % (drafted + 1) else TokenOrigin.TARGET for place in range(len(tokens))]
    accepted_histogram = np.array([0] * drafted + [origins.count(TokenOrigin.TARGET)])
    steps = [origins.count(TokenOrigin.TARGET)]
    return Generation([tokens], [origins], None, ["length"], steps, accepted_histogram, 3 * steps[0], 0, 0.1, 0.3, 4096)


def figures(kind: str, generations: list[Generation], speedup: float) -> DrafterFigures:
    plan = SpeculationPlan(kind, 1, tree_text(DraftTree(TREES[kind])), "cpu, 2 processors", 2.5, 1.5)
    equal = len(generations)
    return DrafterFigures(plan, 100.0, 100 * speedup, speedup, 2.4, equal, equal, 0, [5, 3, 1], generations)


def report_of(drafters: list[DrafterFigures], **changes: Any) -> dict[str, Any]:
    best = max(drafters, key=lambda each: each.speedup)
    report = {
        "lossless": True,
        "plain_tokens_per_second": 100.0,
        "speculative_tokens_per_second": best.speculative_tokens_per_second,
        "speedup": best.speedup,
        "best_drafter": best.plan.drafter,
        "mean_accepted_tokens": best.mean_accepted_tokens,
        "initial_perplexity": 2100.0,
        "validation_perplexity": 21.5,
        "train_tokens": 1_310_720,
        "state_bytes_per_sequence": 4096,
        "prompts": len(best.generations),
        "new_tokens_per_prompt": 192,
        "rounds": 5,
        "seconds": 734.2,
        "device": "cpu, 2 processors",
        "drafters": {
            each.plan.drafter: {
                "speculative_tokens_per_second": each.speculative_tokens_per_second,
                "speedup": each.speedup,
                "mean_accepted_tokens": each.mean_accepted_tokens,
                "prompts_equal_greedy": each.lossless_greedy,
                "prompts_equal_sampled": each.lossless_sampled,
                "tree": each.plan.tree,
                "expected_tokens": each.plan.expected_tokens,
                "expected_speedup": each.plan.expected_speedup,
                "accepted_histogram": each.accepted_histogram,
            }
            for each in drafters
        },
        "head_accuracy": [[0.3, 0.1, 0.02], [0.2, 0.05, 0.0]],
        "validation": [[0, 2100.0], [10, 21.5]],
        "losses": [[1, 7.6], [5, 5.0], [10, 3.1]],
    }
    return {**report, **changes}


def write(tmp_path: Path, tokenizer: Tokenizer, kinds: tuple[str, ...], **changes: Any) -> str:
    texts = [HOSTILE, "def main():\n    return 0\n", "aaaa" * 9]
    prompts = [tokenizer.encode(text).tolist() for text in ("<i>prompt</i>", "x = 1\n", "import re")]
    generations = [generation(tokenizer.encode(text).tolist()) for text in texts]
    drafters = [figures(kind, generations, 1.2 + 0.2 * place) for place, kind in enumerate(kinds)]
    path = tmp_path / "runs" / "report.html"
    path.parent.mkdir(exist_ok=True)
    write_report(path, report_of(drafters, **changes), tokenizer, prompts, drafters)
    return path.read_text(encoding="utf-8")


def svgs(page: str) -> list[str]:
    return re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)


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


def test_stands_alone(tmp_path, tokenizer):
    page = write(tmp_path, tokenizer, tuple(TREES))
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "://" not in without_namespaces
    assert not re.search(r'@import|(?:src|href)="(?!#)|url\((?!#)', without_namespaces)
    assert str(tmp_path) not in page


def test_tags_are_balanced_and_hostile_text_is_text(tmp_path, tokenizer):
    page = write(tmp_path, tokenizer, tuple(TREES))
    balance = Balance()
    balance.feed(page)
    assert not balance.open
    assert not balance.seen & {"script", "b", "i"}
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)


def test_shows_exactly_the_generated_text(tmp_path, tokenizer):
    page = write(tmp_path, tokenizer, ("medusa",))
    shown = re.findall(r"<article.*?<pre>(.*?)</pre>", page, flags=re.DOTALL)
    kinds = [re.findall(r'<span class="(\w+)">(.*?)</span>', each, flags=re.DOTALL) for each in shown]
    texts = [unescape("".join(text for _, text in spans)) for spans in kinds]
    assert texts == ["<i>prompt</i>" + visible(HOSTILE), "x = 1\ndef main():\n    return 0\n", "import re" + "aaaa" * 9]
    assert all(spans[0][0] == "prompt" for spans in kinds)


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
    generations = [generation(tokenizer.encode(text).tolist()) for text in texts]
    samples = choose_samples(tokenizer, [[1]] * 4, generations, count=2)
    assert [sample.number for sample in samples] == [2, 4]
    assert samples[0].drafted == pytest.approx(2 / 3, abs=0.05)


def test_charts_are_xml_with_ids_of_their_own(tmp_path, tokenizer):
    page = write(tmp_path, tokenizer, tuple(TREES))
    drawings = svgs(page)
    # Two widths of the speed chart, three drafters' accepted_histogram, tree, heads, loss, perplexity.
    assert len(drawings) == 9
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert not re.search(r"#0000|<style|<metadata|font-family", drawing)
        assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', drawing)) <= set(re.findall(r'\bid="([^"]+)"', drawing))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_same_figures_give_the_same_page(tmp_path, tokenizer):
    assert write(tmp_path, tokenizer, ("ngram",)) == write(tmp_path, tokenizer, ("ngram",))


def test_one_drafter_without_heads_or_training_figures(tmp_path, tokenizer):
    page = write(tmp_path, tokenizer, ("ngram",), head_accuracy=[], losses=[], validation=[])
    assert "Medusa" not in page
    assert "<h2>Training</h2>" not in page
    assert len(svgs(page)) == 4


def test_no_tree_and_no_steps(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(TREES, "ngram", ())
    page = write(tmp_path, tokenizer, ("ngram",), speedup=1.0)
    assert "nothing is guessed" in page
    assert "no faster on this machine" in page


def test_says_when_the_text_is_not_the_same(tmp_path, tokenizer):
    page = write(tmp_path, tokenizer, ("medusa",), lossless=False)
    assert "Speculation changed the text" in page
    assert "Same text: no" in page


def test_plans_without_drafts_are_called_plain(tmp_path, tokenizer, monkeypatch):
    """Neither a speed-up nor an expectation is told of plain decoding, whatever the clock said."""
    monkeypatch.setitem(TREES, "medusa", ())
    monkeypatch.setitem(TREES, "ngram", ())
    page = write(tmp_path, tokenizer, ("medusa", "ngram"), best_drafter="plain", speedup=1.05)
    assert "no faster on this machine" in page
    assert "times as fast" not in page
    assert page.count("(plain: no tree was faster)") == 2
    assert "best drafter" not in page
    assert "plain decoding: drafts do not pay on this machine" in page
