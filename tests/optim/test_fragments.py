"""Fragments: every parameter in exactly one of them, or an error that names it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyccl.errors import UsageError
from pyccl.optim.fragments import Fragments, blocks_of, split_fragments


def gpt(layers: int, inside: int = 10, outside: int = 3) -> dict[str, int]:
    """Names of a small GPT, in the order of a torch module."""
    names = {"transformer.wte.weight": outside}
    for i in range(layers):
        names |= {f"transformer.h.{i}.attn.weight": inside, f"transformer.h.{i}.mlp.0.weight": inside}
    return names | {"transformer.ln_f.weight": outside}


def layers_of(fragments: Fragments) -> list[set[int]]:
    return [{int(name.split(".")[2]) for name in names if ".h." in name} for names in fragments]


def test_strided_blocks_take_turns() -> None:
    fragments = split_fragments(gpt(24), "strided:8")
    assert layers_of(fragments) == [{i, i + 8, i + 16} for i in range(8)]


def test_sequential_blocks_stay_together() -> None:
    fragments = split_fragments(gpt(24), "sequential:8")
    assert layers_of(fragments) == [{3 * i, 3 * i + 1, 3 * i + 2} for i in range(8)]


def test_number_of_fragments_that_does_not_divide_the_blocks() -> None:
    assert layers_of(split_fragments(gpt(5), "sequential:2")) == [{0, 1, 2}, {3, 4}]
    assert layers_of(split_fragments(gpt(5), "strided:2")) == [{0, 2, 4}, {1, 3}]


def test_ten_comes_after_nine() -> None:
    names = dict.fromkeys((f"blocks.{i}.weight" for i in (10, 9, 2, 11, 0, 1)), 1)
    assert split_fragments(names, "sequential:3") == (
        ("blocks.0.weight", "blocks.1.weight"),
        ("blocks.2.weight", "blocks.9.weight"),
        ("blocks.10.weight", "blocks.11.weight"),
    )


def test_blocks_of_two_lists_are_counted_one_after_the_other() -> None:
    names = ["encoder.0.weight", "encoder.1.weight", "encoder.1.mlp.7.bias", "decoder.0.weight"]
    assert blocks_of(names) == {
        ("encoder", 0): ["encoder.0.weight"],
        ("encoder", 1): ["encoder.1.weight", "encoder.1.mlp.7.bias"],
        ("decoder", 0): ["decoder.0.weight"],
    }


def test_what_is_in_no_block_goes_to_the_smallest_fragment() -> None:
    fragments = split_fragments(gpt(4), "strided:2")
    assert "transformer.wte.weight" in fragments[0]
    assert "transformer.ln_f.weight" in fragments[1]


def test_number_is_strided_where_there_are_blocks() -> None:
    assert split_fragments(gpt(6), 3) == split_fragments(gpt(6), "strided:3")


def test_number_cuts_by_size_where_there_are_no_blocks() -> None:
    assert split_fragments({"a": 5, "b": 5, "c": 1, "d": 9}, 2) == (("a", "b"), ("c", "d"))
    assert split_fragments({"a": 9, "b": 1, "c": 1, "d": 1}, 3) == (("a",), ("b", "c"), ("d",))


def test_number_may_be_numpys() -> None:
    assert split_fragments(gpt(6), np.int64(3)) == split_fragments(gpt(6), 3)


def test_one_fragment_holds_everything() -> None:
    assert split_fragments({"b": 1, "a": 2}, 1) == (("a", "b"),)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.data())
def test_cut_by_size_is_the_most_balanced_there_is(sizes: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(sizes)))
    named = {f"p{chr(97 + i)}": size for i, size in enumerate(sizes)}
    fragments = split_fragments(named, count)
    assert len(fragments) == count and all(fragments)
    assert sorted(itertools.chain(*fragments)) == sorted(named)
    cuts = itertools.combinations(range(1, len(sizes)), count - 1)
    best = min(max(sum(sizes[a:b]) for a, b in itertools.pairwise([0, *cut, len(sizes)])) for cut in cuts)
    assert max(sum(named[name] for name in names) for names in fragments) == best


@given(st.integers(1, 30), st.sampled_from(["strided", "sequential"]), st.data())
def test_every_parameter_is_in_exactly_one_fragment(layers: int, rule: str, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, layers))
    names = gpt(layers)
    fragments = split_fragments(names, f"{rule}:{count}")
    assert sorted(itertools.chain(*fragments)) == sorted(names)
    layers_in = [len(found) for found in layers_of(fragments)]
    assert len(layers_in) == count and max(layers_in) - min(layers_in) <= 1


def test_explicit_names_and_patterns() -> None:
    fragments = split_fragments(gpt(2), [["transformer.h.0.*", "transformer.wte.weight"], ["*.h.1.*", "*ln_f*"]])
    assert fragments == (
        ("transformer.h.0.attn.weight", "transformer.h.0.mlp.0.weight", "transformer.wte.weight"),
        ("transformer.h.1.attn.weight", "transformer.h.1.mlp.0.weight", "transformer.ln_f.weight"),
    )


def test_name_as_it_stands_is_no_pattern() -> None:
    assert split_fragments({"a[0]": 1, "a0": 1}, [["a[0]"], ["a0"]]) == (("a[0]",), ("a0",))


def test_tied_parameter_goes_by_any_of_its_names() -> None:
    sizes, aliases = {"b": 2, "wte": 5}, {"lm_head": "wte"}
    assert split_fragments(sizes, [["b"], ["lm_*"]], aliases) == (("b",), ("wte",))
    assert split_fragments(sizes, [["b"], ["wte", "lm_head"]], aliases) == (("b",), ("wte",))
    with pytest.raises(UsageError, match=r"in more than one of them: wte \(0, 1\)$"):
        split_fragments(sizes, [["b", "wte"], ["lm_head"]], aliases)


def test_parameter_in_none_or_in_two_is_named() -> None:
    with pytest.raises(UsageError, match=r"in none of them.*: c, d$"):
        split_fragments(dict.fromkeys("abcd", 1), [["a"], ["b"]])
    with pytest.raises(UsageError, match=r"in more than one of them: b \(0, 1\)$"):
        split_fragments(dict.fromkeys("abc", 1), [["a", "b"], ["b", "c"]])
    with pytest.raises(UsageError, match=r"in none of them.* and 12 more$"):
        split_fragments({f"n{i}": 1 for i in range(21)}, [["n0"]])


@pytest.mark.parametrize(
    ("fragments", "told"),
    [
        (0, "a number"),
        (True, "a number"),
        (np.bool_(True), "a number"),
        (np.int64(0), "a number"),
        (np.float32(2), "a number"),
        (2.0, "a number"),
        (None, "a number"),
        ("strided", "a number"),
        ("strided:0", "a number"),
        ("sequential:-1", "a number"),
        ("random:2", "a number"),
        ("strided:3", "tell of 2 blocks"),
        (7, "there are 6 parameters"),
        ([], "in none of them"),
        ([[]], r"fragments\[0\] is empty"),
        (["transformer.wte.weight"], r"fragments\[0\].*a sequence of names"),
        ([["no.such"]], "there is no parameter no.such"),
        ([[1]], "a sequence of names"),
    ],
)
def test_what_cannot_be_cut_is_refused(fragments: object, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        split_fragments(gpt(2), fragments)  # type: ignore[arg-type]


def test_no_parameters_are_refused() -> None:
    with pytest.raises(UsageError, match="no parameters"):
        split_fragments({}, 1)
