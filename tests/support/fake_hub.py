"""A Hugging Face Hub in a folder (`models/OWNER/NAME/...`, `datasets/OWNER/NAME/...`), as far as its clients ask it.

As a script it serves small repositories laid out like those that recipes name, reads them with this package, stops, and
reads them again: `python fake_hub.py FOLDER` prints what was found as JSON.
"""

import json
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)")


class FakeHub(ThreadingHTTPServer):
    """The server; `served` counts bytes by file.

    Args:
        root: the folder.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.served: Counter[str] = Counter()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        """Takes no more connections."""
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *words: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self._file(body=False)

    def do_GET(self) -> None:
        if not self.path.startswith("/api/"):
            return self._file(body=True)
        found = _API.fullmatch(unquote(urlsplit(self.path).path))
        folder = None if found is None else self.server.root / found[1] / found[2]
        if found is None or folder is None or not folder.is_dir():
            return self._missing("RepoNotFound")
        if found[3] == "tree":
            whole = "true" in parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower()
            below = folder / (found[5] or "")
            if not below.is_dir():
                return self._missing("EntryNotFound")
            return self._json([self._entry(path, folder) for path in sorted(below.glob("**/*" if whole else "*"))])
        files = [{"rfilename": str(path.relative_to(folder))} for path in sorted(folder.rglob("*")) if path.is_file()]
        return self._json({"id": found[2], "sha": COMMIT, "siblings": files, "private": False, "tags": []})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        found = _API.fullmatch(unquote(urlsplit(self.path).path))
        if found is None:
            return self._missing("RepoNotFound")
        asked = json.loads(content)["paths"] if content.startswith("{") else parse_qs(content).get("paths", [])
        folder = self.server.root / found[1] / found[2]
        return self._json([self._entry(folder / path, folder) for path in asked if (folder / path).exists()])

    def _entry(self, path: Path, folder: Path) -> dict[str, Any]:
        name = str(path.relative_to(folder))
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": COMMIT, "size": 0}
        return {"type": "file", "path": name, "oid": sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size}

    def _file(self, *, body: bool) -> None:
        found = _FILE.fullmatch(unquote(urlsplit(self.path).path))
        path = self.server.root / ("datasets" if found and found[1] else "models") / (found[2] if found else "-")
        if found is None or not path.is_dir():
            return self._missing("RepoNotFound")
        if not (path / found[3]).is_file():
            return self._missing("EntryNotFound")
        data = (path / found[3]).read_bytes()
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        sent = data[int(part[1]) : int(part[2]) + 1 if part[2] else None] if part else data
        self.send_response(206 if part else 200)
        if part:
            self.send_header("Content-Range", f"bytes {part[1]}-{int(part[1]) + len(sent) - 1}/{len(data)}")
        self.send_header("ETag", f'"{sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        if body:
            self.server.served[found[3]] += len(sent)
            self.wfile.write(sent)

    def _missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def lay_out(root: Path) -> None:
    """Repositories with the folders, files, configurations and columns of those that recipes name."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from support.llama2c_files import HEADER, write_file

    def table(place: str, **columns: list[Any]) -> None:
        path = root / "datasets" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)

    def card(place: str, files: dict[str, dict[str, str]]) -> None:
        lines = ["---", "configs:"]
        for config, splits in files.items():
            lines += [f"- config_name: {config}", "  data_files:"]
            lines += [line for name, path in splits.items() for line in (f"  - split: {name}", f"    path: {path}")]
        (root / "datasets" / place / "README.md").write_text("\n".join([*lines, "---", ""]))

    stories = root / "datasets" / "roneneldan" / "TinyStories"
    stories.mkdir(parents=True)
    text = "\n<|endoftext|>\n".join(f"Story {number} of a cat é." for number in range(1000))
    for name in ("TinyStories-train", "TinyStories-valid", "TinyStoriesV2-GPT4-train", "TinyStoriesV2-GPT4-valid"):
        (stories / f"{name}.txt").write_text(f"{name}.\n<|endoftext|>\n{text}")
    parts = {"train": "train-*", "validation": "validation-*", "test": "test-*"}
    for place, names in (
        ("Salesforce/wikitext", ("wikitext-103-raw-v1", "wikitext-2-raw-v1")),
        ("google/wiki40b", ("en",)),
    ):
        for name in names:
            for split in parts:
                table(
                    f"{place}/{name}/{split}-00000-of-00001.parquet", text=["", f" = {name} = \n", f" A {split} . \n"]
                )
        card(place, {name: {split: f"{name}/{end}" for split, end in parts.items()} for name in names})
    tasks = {"sst2": ("sentence",), "mrpc": ("sentence1", "sentence2"), "rte": ("sentence1", "sentence2")}
    for task, columns in tasks.items():
        for split in parts:
            cells = {column: [f"{column} of {task}", f"a {split}"] for column in columns}
            table(f"nyu-mll/glue/{task}/{split}-00000-of-00001.parquet", **cells, label=[0, 1], idx=[0, 1])
    card("nyu-mll/glue", {task: {split: f"{task}/{end}" for split, end in parts.items()} for task in tasks})
    llamas = root / "models" / "karpathy" / "tinyllamas"
    (llamas / "stories260K").mkdir(parents=True)
    write_file(llamas / "stories15M.bin", HEADER)
    write_file(llamas / "stories260K" / "stories260K.bin", HEADER)
    pieces = [piece.encode() for piece in ("<unk>", "\n<s>\n", "\n</s>\n", *" abcdefg")]
    entries = b"".join(np.float32(0).tobytes() + np.int32(len(piece)).tobytes() + piece for piece in pieces)
    (llamas / "stories260K" / "tok512.bin").write_bytes(np.int32(6).tobytes() + entries)
    bert = root / "models" / "google-bert" / "bert-base-uncased"
    bert.mkdir(parents=True)
    (bert / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat")))
    (bert / "config.json").write_text('{"model_type": "bert"}')
    (bert / "pytorch_model.bin").write_bytes(b"pickle")
    smol = root / "models" / "HuggingFaceTB" / "SmolLM2-135M"
    smol.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        (smol / name).write_text("{}")


def questions() -> dict[str, Callable[[], Any]]:
    """What recipes read, by name."""
    from lin_jax.data import DataConfig, load_tokenizer, read_documents, stream_documents
    from lin_jax.data.glue.files import read_examples
    from lin_jax.data.glue.tasks import TRAIN, glue_task
    from lin_jax.hub.files import find_checkpoint
    from lin_jax.training.model_source import ModelSource

    def documents(source: str, **options: Any) -> list[str]:
        return [document.text for document in read_documents(DataConfig(source=source, **options))]

    def examples(name: str) -> list[Any]:
        task = glue_task(name)
        return [read_examples("hub:nyu-mll/glue", task, split) for split in (TRAIN, *task.held_out)]

    def llama() -> Any:
        source = ModelSource.open("hub:karpathy/tinyllamas/stories260K/stories260K.bin")
        tokenizer = source.tokenizer("hub:karpathy/tinyllamas/stories260K/tok512.bin")
        return [source.config.vocab_size, tokenizer.encode("bad").tolist(), source.place.parts[-2:]]

    stories = "hub:roneneldan/TinyStories/TinyStories"
    apart = {"document_separator": "<|endoftext|>"}
    return {
        "llama": llama,
        "stories": lambda: documents(f"{stories}V2-GPT4-train.txt", max_bytes=2000, **apart),
        "fewer stories": lambda: documents(f"{stories}V2-GPT4-train.txt", max_bytes=100, **apart),
        "whole file": lambda: len(documents(f"{stories}-valid.txt", **apart)),
        "wikitext": lambda: documents("hub:Salesforce/wikitext", subset="wikitext-2-raw-v1"),
        "one table": lambda: documents("hub:Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet"),
        "sst2": lambda: examples("sst2"),
        "mrpc": lambda: examples("mrpc"),
        "bert": lambda: load_tokenizer("hub:google-bert/bert-base-uncased").encode("the cat").tolist(),
        "checkpoint": lambda: sorted(path.name for path in find_checkpoint("hub:HuggingFaceTB/SmolLM2-135M").iterdir()),
        # What is not kept.
        "stream": lambda: next(
            iter(stream_documents(DataConfig(source="hub:google/wiki40b", subset="en", streaming=True)))
        ),
        "no such file": lambda: documents("hub:roneneldan/TinyStories/none.txt"),
        "no such model": lambda: find_checkpoint("hub:nobody/nothing"),
        "no such task": lambda: read_examples("hub:nobody/glue", glue_task("rte"), TRAIN),
    }


def main(folder: Path) -> None:
    """Asks everything with the Hub there and gone."""
    lay_out(folder / "hub")
    hub = FakeHub(folder / "hub")
    os.environ |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    from lin_jax.data.sources import remote
    from lin_jax.errors import UserError

    def answers() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, ask in questions().items():
            begin = time.monotonic()
            try:
                found[name] = ask()
            except UserError as error:
                found[name] = f"error: {error}"
            found[f"{name}, seconds"] = time.monotonic() - begin
        return found

    there = answers()
    served = dict(hub.served)
    hub.stop()
    remote._reached.clear()
    print(json.dumps({"there": there, "served": served, "gone": answers()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
