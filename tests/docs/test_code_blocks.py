"""Every code block of the documentation runs, or states why it does not.

A comment before a fenced block says what happens with it:

    <!-- setup: NAME -->           variables that the page's Python blocks start with, from SETUPS below
    <!-- file: PATH -->            the block is written to a file, which later blocks use
    <!-- output -->                what the block before prints; numbers may differ by 10 %
    <!-- error -->                 the last line of the error that the block before ends with
    <!-- composed only: WHY -->    the command line is checked against the configuration, the task does not run
    <!-- not run: WHY -->          nothing is checked

NODELENS_UPDATE_DOCS=1 rewrites the outputs and errors in place.
"""

import contextlib
import copy
import io
import math
import os
import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from command import command
from real import folder
from torch.nn import functional

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("**/*.md")])
PAGES = [page for page in PAGES if page.name not in ("metrics.md", "changelog.md")]
TASKS = ("train", "analyze", "prune")
_BLOCK = re.compile(r"(?:^<!-- (?P<note>[^\n]*?) -->\n)?^```(?P<language>\w+)?[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Block:
    """A fenced block, the comment before it, and where its code lies in the page."""

    language: str
    code: str
    note: str
    span: tuple[int, int]
    line: int


def blocks_of(text):
    return [
        Block(m["language"] or "", m["code"], m["note"] or "", m.span("code"), text[: m.start("code")].count("\n"))
        for m in _BLOCK.finditer(text)
    ]


def trained_cnn():
    """The small convolutional network after three epochs on the embedded digits, and loaders of its splits."""
    from nodelens.data import Digits

    digits = Digits()
    digits.setup()
    model, state = _trained()
    torch.set_rng_state(state)
    loaders = {"loader": "calibration", "train": "train", "val": "val", "test": "test"}
    return {"model": copy.deepcopy(model)} | {name: digits.loader(split) for name, split in loaders.items()}


@cache  # a dozen pages start with it
def _trained():
    """The network, and the state of the generator behind its training."""
    from nodelens.data import Digits
    from nodelens.models import cnn

    digits = Digits()
    digits.setup()
    torch.manual_seed(0)
    model = cnn(classes=10, channels=1, size=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(3):
        for batch in digits.train_dataloader():
            optimizer.zero_grad()
            functional.cross_entropy(model(batch.x), batch.y).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval(), torch.get_rng_state()


def tiny_llama():
    """A Llama of random weights and batches of token ids; the model lies in the folder llama, without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 259}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=128)).eval()
    model.save_pretrained("llama")
    ids = torch.randint(259, (16, 32), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": part, "labels": part} for part in ids.split(4)]
    return {"llm": model, "texts": batches, "held_out": batches[:2]}


def stories():
    """A small language model trained on stories, and its tokenizer. Its page is skipped where NODELENS_DATA is not set."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home = folder("NODELENS_DATA") / "models/stories260K"
    return {"llm": AutoModelForCausalLM.from_pretrained(home).eval(), "tokenizer": AutoTokenizer.from_pretrained(home)}


SETUPS = {"trained_cnn": trained_cnn, "tiny_llama": tiny_llama, "stories": stories}


def words_of(code):
    """The commands of a shell block, as lists of words; a line that ends in a backslash goes on."""
    lines = [line for line in code.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    return [shlex.split(line, comments=True) for line in lines]


def task_of(words):
    """The task and its overrides. Raises ValueError for a command that is none of ours."""
    first, second, *rest = [*words, "", ""]
    rest = [word for word in rest if word]
    if first == "python" and second.removesuffix(".py") in TASKS:
        return second.removesuffix(".py"), rest
    if first == "nodelens" and second in TASKS:
        return second, rest
    raise ValueError(f"not a command of this package: {shlex.join(words)}; say why it is not run")


def compose(words):
    from nodelens.app.config import register
    from nodelens.app.overrides import configs, flags_of

    task, overrides = task_of(words)
    register()
    assert list(configs(task, flags_of(overrides)))


def run_shell(code):
    """What the commands print. Raises RuntimeError with the last line of the error where one fails."""
    printed = ""
    for words in words_of(code):
        task, overrides = task_of(words)
        ended = command(task, *overrides)
        printed += ended.out
        if ended.code:
            raise RuntimeError(ended.err.strip().splitlines()[-1])
    return printed


def run_python(code, names, where):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, where, "exec"), names)
    return out.getvalue()


def same(found, wanted):
    """Equal words; numbers equal to 10 %, or 0.02."""
    left, right = (re.findall(r"-?\d+\.?\d*(?:e-?\d+)?|[^\W\d]+|[^\s\w]", text) for text in (found, wanted))

    def close(a, b):
        try:
            return a == b or math.isclose(float(a), float(b), rel_tol=0.1, abs_tol=0.02)
        except ValueError:
            return False

    return len(left) == len(right) and all(map(close, left, right))


def run_page(page, text):
    """Runs the blocks in order; returns what is printed and raised where the page states it: [(block, text)]."""
    names = {"__name__": "page"}
    for name in re.findall(r"^<!-- setup: (\w+) -->$", text, re.MULTILINE):
        names |= SETUPS[name]()
    blocks, told, last = blocks_of(text), [], ""
    for block, following in zip(blocks, [*blocks, Block("", "", "", (0, 0), 0)][1:], strict=True):
        kind, _, argument = block.note.partition(": ")
        if kind in ("output", "error"):
            told.append((block, last))
        elif kind == "not run" or block.language in ("mermaid", "text"):
            assert argument or kind != "not run", f"{page.name}: say why line {block.line} is not run"
        elif kind == "file":
            Path(argument).parent.mkdir(parents=True, exist_ok=True)
            Path(argument).write_text(block.code)
        elif kind == "composed only":
            assert argument
            for words in words_of(block.code):
                compose(words)
        elif block.language in ("bash", "python"):
            place = f"{page.name}, line {block.line}"
            try:
                last = run_shell(block.code) if block.language == "bash" else run_python(block.code, names, place)
            except Exception as error:
                if not following.note.startswith("error"):
                    raise AssertionError(f"{place}: {error}") from error
                prefix = "" if block.language == "bash" else f"{type(error).__name__}: "
                last = (prefix + str(error)).replace(str(Path.cwd()), "/path/to")
            else:
                assert not following.note.startswith("error"), f"{place} ends in no error"
        else:
            raise AssertionError(f"{page.name}, line {block.line}: say what a block of {block.language!r} is")
    return told


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.filterwarnings("default")
def test_the_blocks_of_a_page_run(page, quiet_home, monkeypatch):
    monkeypatch.syspath_prepend(str(quiet_home))
    text = page.read_text()
    told = run_page(page, text)
    if os.environ.get("NODELENS_UPDATE_DOCS"):
        for block, found in reversed(told):
            if not same(found, block.code):
                text = text[: block.span[0]] + found.rstrip() + "\n" + text[block.span[1] :]
        page.write_text(text)
        return
    for block, found in told:
        assert same(found, block.code), f"{page.name}, line {block.line}: it is now\n{found}\nand the page says\n{block.code}"


def test_most_blocks_run():
    blocks = [block for page in PAGES for block in blocks_of(page.read_text()) if block.language in ("bash", "python")]
    left = [block for block in blocks if block.note.startswith("not run")]
    assert len(left) <= 0.35 * len(blocks), f"{len(left)} of {len(blocks)} blocks are not run"


@pytest.mark.parametrize(
    ("text", "told"),
    {
        "```bash\npython analyze.py metrics=[rqq]\n```\n": "no option 'rqq'",
        "```python\n1 / 0\n```\n": "division by zero",
        "```bash\nls\n```\n": "say why it is not run",
        "<!-- composed only: slow -->\n```bash\npython train.py modle=cnn\n```\n": "Did you mean 'model'",
        "```yaml\na: 1\n```\n": "say what a block of 'yaml' is",
        "```python\n1\n```\n<!-- error -->\n```text\nno\n```\n": "ends in no error",
    }.items(),
    ids=["command", "python", "shell", "composed", "language", "error"],
)
def test_a_block_that_does_not_work_is_found(text, told, quiet_home):
    with pytest.raises((AssertionError, ValueError), match=re.escape(told)):
        run_page(ROOT / "README.md", text)


def test_numbers_may_differ_a_little_and_words_may_not():
    assert same("accuracy  0.95 of 100", "accuracy 0.97\nof 100")
    assert not same("accuracy 0.95", "accuracy 0.5")
    assert not same("accuracy 0.95", "loss 0.95")
