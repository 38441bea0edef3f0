"""Seeded requests of token ids that share prefixes in several ways, and what sharing could save of them at most.

Pure: who answers them is `prefix.py`'s business (the engine) or `llama_server.py`'s.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

Ids = tuple[int, ...]
FIRST_TOKEN = 3  # those before it may mean something: beginning and end of a text


@dataclass(frozen=True)
class Ask:
    """One request: `prompt`, then `tokens` generated ones. It is made `at` seconds after the beginning.

    With `after` it is made when that ask (its place in the list) has been answered; if it `continues` that one, its
    prompt begins with that one's prompt and answer. Those of the `interactive` user run beside the others' work.
    """

    prompt: Ids
    tokens: int
    at: float = 0.0
    after: int | None = None
    continues: bool = False
    interactive: bool = False
    priority: int = 0


@dataclass(frozen=True)
class Spoken:
    """A whole prompt, and what was answered to it."""

    prompt: Ids
    answer: Ids


class Dice:
    """All chance of the workloads."""

    def __init__(self, vocab: int, seed: int) -> None:
        self._vocab, self._random = vocab, random.Random(seed)

    def ids(self, count: int) -> Ids:
        """So many tokens."""
        return tuple(self._random.randrange(FIRST_TOKEN, self._vocab) for _ in range(count))

    def shuffled(self, asks: Iterable[Ask]) -> list[Ask]:
        """The same in another order."""
        asks = list(asks)
        self._random.shuffle(asks)
        return asks

    def pareto(self, least: int, most: int) -> int:
        """Heavy-tailed (exponent 1.1): a quarter is more than 3.5 times `least`, a tenth more than 8 times."""
        return min(most, int(least * self._random.paretovariate(1.1)))

    def waits(self, rate: float) -> Iterator[float]:
        """Seconds between arrivals that know nothing of each other, `rate` a second."""
        while True:
            yield self._random.expovariate(rate)


def sharers(
    dice: Dice, groups: int, members: int = 16, shared: int = 512, own: int = 50, tokens: int = 25
) -> list[Ask]:
    """Groups with one long prefix each, all asked at once and shuffled together."""
    prefixes = [dice.ids(shared) for _ in range(groups)]
    return dice.shuffled(Ask(prefix + dice.ids(own), tokens) for prefix in prefixes for _ in range(members))


def levels(
    dice: Dice, lengths: tuple[int, ...], branches: tuple[int, ...], own: int = 50, tokens: int = 25
) -> list[Ask]:
    """A tree of prefixes: each node at depth i adds `lengths[i]` tokens and has `branches[i]` children."""
    prefixes = [dice.ids(lengths[0])]
    for length, count in zip((*lengths[1:], own), branches, strict=True):
        prefixes = [prefix + dice.ids(length) for prefix in prefixes for _ in range(count)]
    return dice.shuffled(Ask(prefix, tokens) for prefix in prefixes)


def chats(dice: Dice, count: int, turns: int, system: int = 160, turn: int = 48, tokens: int = 25) -> list[Ask]:
    """Conversations of one system prompt, each of whose turns adds to what was said before, answers included."""
    asks, beginning = list[Ask](), dice.ids(system)
    for number in range(turns):
        for _ in range(count):
            if number == 0:
                asks.append(Ask(beginning + dice.ids(turn), tokens))
            else:
                asks.append(Ask(dice.ids(turn), tokens, after=len(asks) - count, continues=True))
    return asks


def heavy_tailed(dice: Dice, asks: list[Ask], most: int) -> list[Ask]:
    """The same with answers of 4 tokens, seldom many more."""
    return [replace(ask, tokens=dice.pareto(4, most)) for ask in asks]


def arriving(dice: Dice, asks: list[Ask], rate: float) -> list[Ask]:
    """The same, arriving at random, `rate` a second."""
    times = accumulate(wait for _, wait in zip(asks, dice.waits(rate), strict=False))
    return [replace(ask, at=at) for ask, at in zip(asks, times, strict=True)]


def alone(dice: Dice, count: int, prompt: int, tokens: int = 25) -> list[Ask]:
    """Nothing in common."""
    return [Ask(dice.ids(prompt), tokens) for _ in range(count)]


def in_turn(asks: list[Ask], users: int) -> list[Ask]:
    """The same from so many users, who ask as soon as they are answered: that many requests are open all the time."""
    return [replace(ask, after=number - users if number >= users else None) for number, ask in enumerate(asks)]


def together(first: list[Ask], second: list[Ask]) -> list[Ask]:
    """Both lists as one."""
    shift = len(first)
    return first + [replace(ask, after=None if ask.after is None else ask.after + shift) for ask in second]


def longest(asks: list[Ask]) -> int:
    """Tokens of the longest text, answers included."""
    lengths = list[int]()
    for ask in asks:
        before = lengths[ask.after] if ask.continues and ask.after is not None else 0
        lengths.append(before + len(ask.prompt) + ask.tokens)
    return max(lengths)


def most_saved(spoken: Iterable[Spoken], grain: int) -> int:
    """Prompt tokens that need not be computed, at most: of every distinct chain of pieces only the first is.

    That is what saves whoever shares pieces of `grain` tokens, forgets nothing and chooses the order.
    The last token of a prompt is always computed, as its logits are wanted; the last of an answer never. A piece that
    an answer or a prompt's last token completed costs a prompt that begins with it nothing. O(all tokens).
    """
    spoken, trie = list(spoken), dict[tuple[int, Ids], int]()

    def chain(ids: Ids) -> list[int]:
        """A number for each whole piece and all before it."""
        numbers, above = [], -1
        for start in range(0, len(ids) - grain + 1, grain):
            above = trie.setdefault((above, ids[start : start + grain]), len(trie))
            numbers.append(above)
        return numbers

    wanted, free, total = set[int](), set[int](), 0
    for each in spoken:
        usable = max(0, len(each.prompt) - 1) // grain
        numbers = chain(each.prompt + each.answer[:-1])
        wanted.update(numbers[:usable])
        free.update(numbers[usable:])
        total += usable
    return (total - len(wanted - free)) * grain
