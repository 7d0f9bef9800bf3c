"""Fragments: which parameters are exchanged together. Names and sizes go in, names come out; nothing else is known.

Streaming DiLoCo (arXiv:2501.18512) cuts a model into fragments of whole blocks and exchanges one at a time:

    blocks                0  1  2  3  4  5        (an integer in a name says which: h.3.attn.weight is of block h.3)
    "sequential:3"        0  0  1  1  2  2
    "strided:3"           0  1  2  0  1  2        no two early blocks are due together; the paper's choice
    what is in no block   the embedding, the last norm: each to the fragment that is the smallest by then
    no blocks at all      runs of parameters in their order whose largest sum is as small as it can be

Invariant: every parameter is in exactly one fragment (one in none would never be synchronised, and nothing would tell).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Final

import numpy as np

from pyccl.errors import UsageError

Fragments = tuple[tuple[str, ...], ...]
Block = tuple[str, int]  # what stands before the first integer of the names, and that

_RULE: Final = re.compile(r"(strided|sequential):([0-9]{1,9})", re.ASCII)
_NAMED_MAX: Final = 8  # names in an error


def split_fragments(
    sizes: Mapping[str, int],
    fragments: int | str | Sequence[Sequence[str]],
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> Fragments:
    """Cut named parameters into fragments.

    Args:
        sizes: elements of each parameter, in an order that is the same on all peers.
        fragments: how many, "strided:N", "sequential:N", or the fragments themselves: sequences of names or of patterns
            such as "h.0.*" (``fnmatch``; what is a name as it stands is no pattern). A number is "strided:N" where the
            names tell of N blocks or more, else the parameters are cut by size.
        aliases: further names of tied parameters, and those they stand for.
    Returns:
        The names of each fragment, sorted.
    Raises:
        UsageError: nothing of that kind, more than there are blocks or parameters, a parameter in none or in two.
    """
    if not sizes:
        raise UsageError("there are no parameters to cut into fragments")
    if isinstance(fragments, bool) or not isinstance(fragments, int | np.integer | str | Sequence):
        raise UsageError(_not_fragments(fragments))
    if isinstance(fragments, int | np.integer):
        found = _counted(sizes, int(fragments))
    elif isinstance(fragments, str):
        found = _by_rule(sizes, fragments)
    else:
        found = _given(sizes, fragments, aliases)
    return tuple(tuple(sorted(names)) for names in found)


def blocks_of(names: Sequence[str]) -> dict[Block, list[str]]:
    """The names of each block, in the order of the blocks: of their lists' first names, then by number."""
    found: dict[Block, list[str]] = {}
    lists: dict[str, int] = {}
    for name in names:
        block = _block(name)
        if block is not None:
            lists.setdefault(block[0], len(lists))
            found.setdefault(block, []).append(name)
    return {block: found[block] for block in sorted(found, key=lambda block: (lists[block[0]], block[1]))}


def _block(name: str) -> Block | None:
    """Of "layers.3.mlp.0.weight": ("layers", 3)."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isascii() and part.isdigit():
            return ".".join(parts[:i]), int(part)
    return None


def _not_fragments(fragments: object) -> str:
    return (
        f'fragments={fragments!r}: a number, "strided:N", "sequential:N" or a sequence of sequences of names is needed'
    )


def _counted(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    if count < 1:
        raise UsageError(_not_fragments(count))
    blocks = blocks_of(list(sizes))
    return _of_blocks(sizes, blocks, count, "strided") if len(blocks) >= count else _by_size(sizes, count)


def _by_rule(sizes: Mapping[str, int], rule: str) -> list[list[str]]:
    match = _RULE.fullmatch(rule)
    if match is None or int(match[2]) < 1:
        raise UsageError(_not_fragments(rule))
    blocks, count = blocks_of(list(sizes)), int(match[2])
    if len(blocks) < count:
        raise UsageError(
            f"fragments={rule!r}: the parameters' names tell of {len(blocks)} blocks (an integer between dots, as in "
            f'"layers.3.weight"); fragments={count} cuts by size'
        )
    return _of_blocks(sizes, blocks, count, match[1])


def _of_blocks(sizes: Mapping[str, int], blocks: Mapping[Block, list[str]], count: int, rule: str) -> list[list[str]]:
    found: list[list[str]] = [[] for _ in range(count)]
    for i, names in enumerate(blocks.values()):
        found[i % count if rule == "strided" else i * count // len(blocks)].extend(names)
    filled = [sum(sizes[name] for name in names) for names in found]
    in_blocks = {name for names in blocks.values() for name in names}
    for name in sizes:
        if name not in in_blocks:
            smallest = filled.index(min(filled))
            found[smallest].append(name)
            filled[smallest] += sizes[name]
    return found


def _by_size(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Runs of names, none empty, whose largest sum is the least possible: that bound is sought by halving."""
    if count > len(sizes):
        raise UsageError(f"fragments={count}: there are {len(sizes)} parameters")
    low, high = max(sizes.values()), sum(sizes.values())
    while low < high:
        middle = (low + high) // 2
        if len(_runs(sizes, middle, 1)) <= count:
            high = middle
        else:
            low = middle + 1
    return _runs(sizes, low, count)


def _runs(sizes: Mapping[str, int], most: int, least_count: int) -> list[list[str]]:
    """Fill one run after the other up to `most`; those left over are kept short enough that `least_count` come out."""
    found: list[list[str]] = [[]]
    filled = 0
    for i, (name, size) in enumerate(sizes.items()):
        must_part = len(sizes) - i <= least_count - len(found)
        if found[-1] and (must_part or filled + size > most):
            found.append([])
            filled = 0
        found[-1].append(name)
        filled += size
    return found


def _given(sizes: Mapping[str, int], fragments: Sequence[Sequence[str]], aliases: Mapping[str, str]) -> list[list[str]]:
    known = {**aliases, **{name: name for name in sizes}}
    found = [_matched(known, i, wanted) for i, wanted in enumerate(fragments)]
    homes: dict[str, list[int]] = {name: [] for name in sizes}
    for i, names in enumerate(found):
        for name in names:
            homes[name].append(i)
    lost = [name for name, where in homes.items() if not where]
    if lost:
        raise UsageError(f"fragments: in none of them, and so never synchronised: {_some(lost)}")
    doubled = [f"{name} ({', '.join(map(str, where))})" for name, where in homes.items() if len(where) > 1]
    if doubled:
        raise UsageError(f"fragments: in more than one of them: {_some(doubled)}")
    return found


def _matched(known: Mapping[str, str], number: int, wanted: Sequence[str]) -> list[str]:
    """The parameters that the names and patterns of one fragment stand for, each once."""
    if isinstance(wanted, str) or not isinstance(wanted, Sequence) or not all(isinstance(w, str) for w in wanted):
        raise UsageError(f"fragments[{number}]={wanted!r}: a sequence of names is needed")
    names: dict[str, None] = {}
    for pattern in wanted:
        hits = [known[pattern]] if pattern in known else [known[name] for name in known if fnmatchcase(name, pattern)]
        if not hits:
            raise UsageError(f"fragments[{number}]: there is no parameter {pattern}")
        names.update(dict.fromkeys(hits))
    if not names:
        raise UsageError(f"fragments[{number}] is empty")
    return list(names)


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED_MAX
    return ", ".join(names[:_NAMED_MAX]) + (f" and {more} more" if more > 0 else "")
