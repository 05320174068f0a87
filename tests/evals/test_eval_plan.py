"""What an eval group of a recipe may say."""

from __future__ import annotations

from typing import Any

import pytest

from vicugna.errors import VicugnaError
from vicugna.evals.plan import grid

GROUP = {"group": "g", "task": "reasoning.steps", "n": 3}


def test_lists_are_each_value_with_each_other() -> None:
    specs = grid({**GROUP, "length_tokens": [64, 128], "difficulty": {"depth": [1, 2], "count": 3}})
    assert [(s.length_tokens, s.difficulty.depth, s.difficulty.count) for s in specs] == [
        (64, 1, 3), (64, 2, 3), (128, 1, 3), (128, 2, 3)]


@pytest.mark.parametrize(("more", "message"), [
    ({"lenght_tokens": 3}, "unknown key 'lenght_tokens'. Did you mean 'length_tokens'?"),
    ({"difficulty": {"dept": 3}}, "unknown key 'dept'. Did you mean 'depth'?"),
    ({"difficulty": [3]}, "difficulty is not a mapping"),
    ({"difficulty": {"depth": "deep"}}, "difficulty.depth: Input should be a valid integer"),
    ({"n": "many"}, "n: Input should be a valid integer"),
    ({"n": 0}, "n, max_new_tokens and length_tokens must be positive"),
    ({"task": None}, "task: Input should be a valid string"),
])
def test_mistakes_name_the_group_and_the_key(more: dict[str, Any], message: str) -> None:
    with pytest.raises(VicugnaError) as caught:
        grid({**GROUP, **more})
    assert str(caught.value).startswith(f"eval group 'g': {message}")


def test_a_missing_key() -> None:
    with pytest.raises(VicugnaError, match="eval group 'g': n: Field required"):
        grid({"group": "g", "task": "reasoning.steps"})
