import numpy as np

from diffx.results.curves import tokens_at_equal_loss, tokens_to_reach


def test_tokens_to_reach_interpolates_to_the_first_crossing():
    tokens, losses = np.array([0.0, 100.0, 200.0, 300.0]), np.array([8.0, 4.0, 5.0, 3.0])
    assert tokens_to_reach(tokens, losses, 6.0) == 50
    assert tokens_to_reach(tokens, losses, 4.0) == 100
    assert tokens_to_reach(tokens, losses, 3.5) == 275
    assert tokens_to_reach(tokens, losses, 9.0) == 0
    assert tokens_to_reach(tokens, losses, 2.0) is None


def test_token_ratio_at_equal_loss_of_known_curves():
    tokens = np.array([0.0, 100.0, 200.0])
    slow, fast = np.array([8.0, 6.0, 4.0]), np.array([8.0, 4.0, 2.0])
    better = tokens_at_equal_loss((tokens, fast), (tokens, slow))
    assert (better.better, better.loss, better.tokens, better.baseline_tokens, better.ratio) == (
        True,
        4.0,
        100,
        200,
        0.5,
    )
    worse = tokens_at_equal_loss((tokens, slow), (tokens, fast))
    assert (worse.better, worse.loss, worse.tokens, worse.baseline_tokens, worse.ratio) == (
        False,
        4.0,
        200,
        100,
        2.0,
    )
    diverged = np.array([8.0, 9.0, 10.0])
    assert tokens_at_equal_loss((tokens, diverged), (tokens, fast)) is None
