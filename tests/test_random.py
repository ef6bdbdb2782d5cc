"""Random streams: a function of (seed, counter), per sample, per thread."""

import threading

import numpy as np
import pytest
from helpers import assert_close, host

from tinylm import random
from tinylm.random import Key

KEY = Key(seed=1, counter=2, first_sample=0)


def draw(device, key, shape):
    return host(random.uniform(key, shape, like=device.array(0.0)))


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (4, 8), (2, 3, 9), (1, 1), (0, 4)])
def test_the_same_key_draws_the_same(device, shape):
    numbers = draw(device, KEY, shape)
    assert (numbers.shape, numbers.dtype) == (shape, np.float32)
    np.testing.assert_array_equal(numbers, draw(device, KEY, shape))


def test_both_devices_draw_the_same(device):
    np.testing.assert_array_equal(draw(device, KEY, (5, 6)), random.uniform(KEY, (5, 6), like=np.zeros(1)))


@pytest.mark.parametrize("shape", [(12,), (12, 3), (12, 8), (12, 2, 5), (12, 17)])
def test_samples_do_not_depend_on_their_batch(device, shape):
    """Samples 6..11 alone (`first_sample=6`) get the same numbers as in the whole batch, however it is divided."""
    whole = draw(device, KEY, shape)
    np.testing.assert_array_equal(draw(device, KEY._replace(first_sample=6), (6, *shape[1:])), whole[6:])
    parts = [draw(device, KEY._replace(first_sample=i), (n, *shape[1:])) for i, n in ((0, 5), (5, 1), (6, 6))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_uniform_statistics(device):
    numbers = draw(device, KEY, (400, 250)).astype(np.float64)
    assert 0 <= numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    for power in (1, 2, 3):
        assert (numbers**power).mean() == pytest.approx(1 / (power + 1), abs=0.005)
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 95  # chi squared with 49 degrees of freedom: below 1 in 10,000
    for lag in (1, 2, 4, 8, 250):
        flat = numbers.ravel()
        assert abs(np.corrcoef(flat[:-lag], flat[lag:])[0, 1]) < 0.015


@pytest.mark.parametrize(
    "other",
    [
        KEY._replace(seed=2),
        KEY._replace(counter=3),
        KEY._replace(first_sample=1000),
        KEY._replace(seed=2, counter=1),
        KEY._replace(seed=1 + 2**32),
        KEY._replace(seed=-1),
        KEY._replace(counter=-1),
    ],
    ids=str,
)
def test_keys_are_independent(device, other):
    a, b = (draw(device, key, (200, 200)).ravel() for key in (KEY, other))
    assert (a != b).mean() > 0.999
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.025
    assert not np.isin(a[:8], b).all()  # nor the same stream from another place


def test_seeds_are_taken_modulo_2_to_the_64(device):
    np.testing.assert_array_equal(
        draw(device, KEY._replace(seed=2**64 + 1), (9,)), draw(device, KEY._replace(seed=1), (9,))
    )


def test_neighbouring_large_seeds_differ(device):
    """float64 cannot represent 2**63 + 1: a conversion to it would merge neighbouring seeds."""
    a, b = (draw(device, KEY._replace(seed=2**63 + n), (40,)) for n in (1, 2))
    assert (a != b).all()


def test_next_key_counts():
    random.seed(5)
    first, second = random.next_key(), random.next_key()
    assert first == Key(5, 1, 0)
    assert second == Key(5, 2, 0)


@pytest.mark.parametrize("shape", [(3, 7, 5), (2, 6, 2, 3), (1, 4), (4, 9, 8)])
def test_rows_are_drawn_as_in_the_whole(device, shape):
    whole = draw(device, KEY, shape)
    for start in range(shape[1]):
        for end in range(start + 1, shape[1] + 1):
            part = host(random.uniform(KEY, shape, device.array(0.0), rows=(start, end)))
            np.testing.assert_array_equal(part, whole[:, start:end])


def test_state_is_what_seed_takes():
    random.seed(5, counter=10, first_sample=6)
    random.next_key()
    state = random.state()
    assert state == (5, 11, 6)
    expected = random.next_key()
    random.seed(*state)
    assert random.next_key() == expected


def test_threads_have_streams_of_their_own():
    random.seed(5)
    random.next_key()
    seen = []

    def work():
        seen.append(random.state())
        random.seed(9, 100)
        seen.append(random.next_key())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(0, 0, 0), Key(9, 101, 0)]
    assert random.next_key() == Key(5, 2, 0)


def test_generators_depend_on_every_number():
    drawn = {
        key: random.generator(*key).random() for key in ((1, 2), (2, 1), (1, 3), (1, 2, 3), (1, 2, 4), (1,), (-1,))
    }
    assert len(set(drawn.values())) == len(drawn)
    assert_close(random.generator(1, 2).random(5), random.generator(1, 2).random(5))
