"""The documentation keeps up with the code: messages, headers, names; its examples run."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flash_mla
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
CPP_FOLDERS = ("src/api", "src/bindings", "src/cpu", "src/cuda")
PYTHON_FILES = (
    *("calls", "cuda", "decode", "frameworks", "info", "jax_ffi", "merge", "options", "plan", "torch_library"),
    *("integration/_shared", "integration/vllm"),
)

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="needs the source tree")

STRING = r'"(?:[^"\\]|\\.)*"'
THROWING = re.compile(rf"(?:\bthrow \w[\w:]*|\bfail(?:_\w+)?|\brefuse)\((?:[^;\"]|{STRING})*\);")
MADE_OF_TEXT = (ast.BinOp, ast.Constant, ast.IfExp, ast.JoinedStr, ast.Tuple)
MIN_LENGTH = 8  # shorter pieces of a message, such as ", got ", say nothing


def plain(text: str) -> str:
    """The words of a message or a page, spaced alike."""
    return " ".join(text.replace("`", "").split())


def cpp_messages(source: str) -> Iterator[str]:
    """The constant parts of what each statement that throws says."""
    for statement in THROWING.findall(source):
        joined = re.sub(r'"\s*\n\s*"', "", statement)
        yield from (literal[1:-1] for literal in re.findall(STRING, joined))


def python_messages(source: str) -> Iterator[str]:
    """The constant parts of what each ``raise`` makes, and of each reason that a function returns."""
    for node in ast.walk(ast.parse(source)):
        made = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else None
        if made is None or (isinstance(node, ast.Return) and not isinstance(made, MADE_OF_TEXT)):
            continue
        parts = (part.value for part in ast.walk(made) if isinstance(part, ast.Constant))
        yield from (part for part in parts if isinstance(part, str))


def all_messages() -> dict[str, str]:
    """Each message that the library can raise, with the file that it is in."""
    found: dict[str, str] = {}
    for folder in CPP_FOLDERS:
        for path in sorted((REPOSITORY / folder).glob("*.cpp")) + sorted((REPOSITORY / folder).glob("*.h")):
            found |= dict.fromkeys(cpp_messages(path.read_text()), str(path.relative_to(REPOSITORY)))
    for name in PYTHON_FILES:
        path = REPOSITORY / "python" / "flash_mla" / f"{name}.py"
        found |= dict.fromkeys(python_messages(path.read_text()), str(path.relative_to(REPOSITORY)))
    messages = ((plain(text).strip(" :,;()"), path) for text, path in found.items())
    return {message: path for message, path in messages if len(message) >= MIN_LENGTH}


def test_finds_the_messages() -> None:
    """What the next test rests on: every kind of statement is found."""
    messages = all_messages()
    assert len(messages) > 50
    for message in (
        "strides that keep its elements apart",
        "no usable CUDA driver",
        "the kernels need a Hopper GPU (compute capability 9.0",
        "the CUDA driver sees no GPU",
        "flash_mla needs a CUDA device",
        "cannot be read through DLPack",
        "num_splits: expected None beside a FlashMLASchedMeta, got",
        "there is no CUDA driver: libcuda.so.1 is not found",
        "the kernels need a Hopper GPU (compute capability 9.0), found",
        "workspace: expected at least",
        "bfloat16, float16 or float32",
    ):
        assert message in messages


def test_troubleshooting_has_every_message() -> None:
    page = plain((DOCS / "troubleshooting.md").read_text())
    missing = {message: path for message, path in all_messages().items() if message not in page}
    assert not missing, "docs/troubleshooting.md says nothing about these messages"


@pytest.mark.parametrize("header", sorted((REPOSITORY / "include" / "flash_mla").glob("*.h")), ids=lambda p: p.name)
def test_cpp_api_shows_every_header(header: Path) -> None:
    assert f"```{{literalinclude}} ../include/flash_mla/{header.name}\n" in (DOCS / "cpp_api.md").read_text()


@pytest.mark.parametrize("name", flash_mla.__all__)
def test_python_api_shows_every_name(name: str) -> None:
    page = (DOCS / "python_api.md").read_text()
    assert re.search(rf"\.\. (autofunction|autoclass|exception|data):: {name}\n", page)


def test_every_page_is_in_the_table_of_contents() -> None:
    pages = {str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md")} - {"index"}
    assert pages <= set((DOCS / "index.md").read_text().split())


@pytest.mark.parametrize(
    ("html", "remote"),
    [
        ('<a href="https://example.org">x</a><img src="a.png"><script src="_static/a.js"></script>', []),
        ('<link rel="stylesheet" href="https://example.org/a.css">', ["https://example.org/a.css"]),
        ('<script src="//example.org/a.js"></script>', ["//example.org/a.js"]),
        ('<img src="http://example.org/a.png">', ["http://example.org/a.png"]),
        ("<style>@import 'https://example.org/f.css';</style>", ["https://example.org/f.css"]),
        ('<p style="background: url(https://example.org/b.png)">', ["https://example.org/b.png"]),
    ],
)
def test_check_of_the_built_site(html: str, remote: list[str], tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("check_site", DOCS / "check_site.py")
    assert spec is not None
    assert spec.loader is not None
    check_site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_site)
    (tmp_path / "page.html").write_text(f"<html><body>{html}</body></html>")
    assert check_site.remote_fetches(tmp_path) == [f"page.html: {address}" for address in remote]
    (tmp_path / "a.css").write_text("@font-face { src: url('https://example.org/font.woff2') }")
    assert check_site.remote_fetches(tmp_path)[-1] == "a.css: https://example.org/font.woff2"


def python_blocks(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL))


def test_the_quick_start_runs() -> None:
    pytest.importorskip("torch")
    exec(compile(python_blocks("quickstart.md"), "quickstart.md", "exec"), {})


@pytest.mark.gpu
def test_the_planning_page_runs(torch: Any) -> None:
    names: dict[str, Any] = {
        "torch": torch,
        "flash_mla_with_kvcache": flash_mla.flash_mla_with_kvcache,
        "get_mla_metadata": flash_mla.get_mla_metadata,
        "seqlen_q": 2,
        "num_heads_q": 16,
        "num_layers": 3,
        "q": torch.randn(2, 2, 16, 576, device="cuda").bfloat16(),
        "k_cache": torch.randn(8, 64, 1, 576, device="cuda").bfloat16(),
        "block_table": torch.tensor([[3, 1, 6], [5, 0, 0]], dtype=torch.int32, device="cuda"),
        "cache_seqlens": torch.tensor([150, 0], dtype=torch.int32, device="cuda"),
    }
    names["k_caches"] = [names["k_cache"].clone() for _ in range(3)]
    exec(compile(python_blocks("planning.md"), "planning.md", "exec"), names)
    torch.cuda.synchronize()
    assert all(torch.isfinite(out).all() for out, _ in names["layers"])


@pytest.mark.parametrize("page", sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")))
def test_python_examples_parse(page: str) -> None:
    ast.parse(python_blocks(page))
