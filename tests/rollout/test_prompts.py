"""Tests of prompt files, their faults, and the order in which a run uses prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.prompts import PromptFileError, load_prompts, prompt_at
from rollout.records import Prompt


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def numbered(count: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(index=i, text=f"prompt {i}") for i in range(count))


def test_json_lines_keep_their_metadata(tmp_path: Path) -> None:
    lines = [{"prompt": "a red cat", "tag": "colors", "include": [{"count": 2}]}, {"prompt": "ein Käfer"}]
    path = write(tmp_path, "p.jsonl", "\n\n".join(json.dumps(line) for line in lines) + "\n")
    assert load_prompts(path) == (
        Prompt(index=0, text="a red cat", metadata={"tag": "colors", "include": [{"count": 2}]}),
        Prompt(index=1, text="ein Käfer"),
    )


def test_a_prompt_knows_its_line_which_is_no_part_of_it(tmp_path: Path) -> None:
    text = write(tmp_path, "p.txt", "\na cat\r\n\r\n\r\na dog\r\n")
    assert [prompt.origin for prompt in load_prompts(text)] == [f"{text}:2", f"{text}:5"]
    lines = write(tmp_path, "p.jsonl", '\n\n{"prompt": "a cat"}\n{"prompt": "a dog"}')
    assert [prompt.origin for prompt in load_prompts(lines)] == [f"{lines}:3", f"{lines}:4"]
    assert load_prompts(text) == load_prompts(lines)


def test_text_lines_are_prompts_whatever_the_line_ending(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "  a cat \r\n\r\na dog\r\n")
    assert load_prompts(path) == (Prompt(index=0, text="a cat"), Prompt(index=1, text="a dog"))


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    text = write(tmp_path, "p.txt", "a cat\na dog\n".encode("utf-8-sig"))
    assert [prompt.text for prompt in load_prompts(text)] == ["a cat", "a dog"]
    lines = write(tmp_path, "p.jsonl", '{"prompt": "a cat"}\n'.encode("utf-8-sig") * 2)  # joined from two
    assert [prompt.text for prompt in load_prompts(lines)] == ["a cat", "a cat"]


@pytest.mark.parametrize("unseen", ["\u200b", "\u2060\t", "\x00", "\u3164"])
def test_a_prompt_that_nobody_can_see_is_refused_by_line(tmp_path: Path, unseen: str) -> None:
    lines = "\n".join(json.dumps({"prompt": text}) for text in ("a cat", unseen))
    with pytest.raises(PromptFileError, match=r'p\.jsonl:2: expected an object with a non-empty string "pro'):
        load_prompts(write(tmp_path, "p.jsonl", lines))
    if "\x00" not in unseen:  # a file with it is no text at all
        with pytest.raises(PromptFileError, match=r"p\.txt:3: only invisible characters: '"):
            load_prompts(write(tmp_path, "p.txt", f"a cat\n\n{unseen}\n"))


@pytest.mark.parametrize(
    "text", ["a pair \U0001f468\u200d\U0001f469", "\u0645\u06cc\u200c\u0631\u0648\u0645"]
)
def test_joiners_that_a_script_needs_stay(tmp_path: Path, text: str) -> None:
    assert load_prompts(write(tmp_path, "p.txt", text))[0].text == text


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0c"])
def test_only_newlines_end_a_line(tmp_path: Path, separator: str) -> None:
    text = f"a cat{separator}a dog"
    jsonl = write(tmp_path, "p.jsonl", json.dumps({"prompt": text}, ensure_ascii=False))
    assert [prompt.text for prompt in load_prompts(jsonl)] == [text]
    assert [prompt.text for prompt in load_prompts(write(tmp_path, "p.txt", text))] == [text]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ('{"prompt": "a cat"', "not JSON"),
        ('["a cat"]', 'expected an object with a non-empty string "prompt"'),
        ('{"text": "a cat"}', 'expected an object with a non-empty string "prompt"'),
        ('{"prompt": 3}', 'expected an object with a non-empty string "prompt"'),
        ('{"prompt": "  "}', 'expected an object with a non-empty string "prompt"'),
        ('{"prompt": "\\u200b"}', 'expected an object with a non-empty string "prompt"'),
        ('{"prompt": "a cat \\ud83d"}', r"'\ud83d' is half of a character"),
        ('{"prompt": "a cat", "text": "\\udc00"}', r"'\udc00' is half of a character"),
        (f'{{"prompt": "a cat", "count": {"9" * 5000}}}', "not JSON (Exceeds the limit"),
        ('{"prompt": "a", "x": {"b": 1, "a": 2, "a": 3}}', "not JSON (the key 'a' is repeated)"),
        ("[" * 100_000, "not JSON (maximum recursion depth"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, broken: str, reason: str) -> None:
    path = write(tmp_path, "p.jsonl", f'{{"prompt": "a dog"}}\n\n{broken}\n')
    with pytest.raises(PromptFileError) as caught:
        load_prompts(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: {reason}")
    assert broken[:80] in message.replace("\\\\", "\\")


def test_the_first_ten_broken_lines_are_named_and_the_others_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "a cat\n\n" + "\u200b\n" * 3)
    with pytest.raises(PromptFileError) as caught:
        load_prompts(path)
    fault = r"only invisible characters: '\u200b'"
    assert str(caught.value) == "; ".join(f"{path}:{number}: {fault}" for number in (3, 4, 5))
    write(tmp_path, "p.txt", "\u200b\n" * 11)
    with pytest.raises(PromptFileError) as caught:
        load_prompts(path)
    assert str(caught.value).endswith(f"{path}:10: {fault}; and 1 more")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("p.csv", "a cat", "expected a .jsonl or .txt"),
        ("p.txt", "\n  \n", "holds no prompt"),
        ("p.jsonl", "", "holds no prompt"),
        ("p.txt", "a cat".encode("utf-16"), "is UTF-16; save it as UTF-8"),
    ],
)
def test_an_unusable_file_is_named(tmp_path: Path, name: str, content: str | bytes, reason: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(PromptFileError) as caught:
        load_prompts(path)
    assert str(caught.value).startswith(f"{path}: {reason}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PromptFileError, match=r"none\.jsonl: cannot read"):
        load_prompts(tmp_path / "none.jsonl")


@given(st.integers(1, 30), st.integers(0, 2**31), st.integers(0, 50))
def test_an_epoch_covers_every_prompt_once(count: int, seed: int, epoch: int) -> None:
    prompts = numbered(count)
    walk = [prompt_at(prompts, seed, epoch * count + offset) for offset in range(count)]
    assert sorted(prompt.index for prompt in walk) == list(range(count))


@given(st.integers(1, 30), st.integers(0, 2**31), st.lists(st.integers(0, 500), max_size=10))
def test_the_walk_has_no_state(count: int, seed: int, positions: list[int]) -> None:
    prompts = numbered(count)
    forward = [prompt_at(prompts, seed, position) for position in positions]
    backward = [prompt_at(prompts, seed, position) for position in reversed(positions)]
    assert forward == backward[::-1]


def test_epochs_and_seeds_have_their_own_order() -> None:
    prompts = numbered(20)

    def walk(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(prompt_at(prompts, seed, 20 * epoch + i).index for i in range(20))

    assert len({walk(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9
