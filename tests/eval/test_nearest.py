"""Nearest training picture and diversity, against loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilora_diffusion.errors import UserError
from eval.scores.nearest import nearest, pairwise_diversity


def random(rows: int, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    x, y = a.tolist(), b.tolist()
    dot = sum(p * q for p, q in zip(x, y, strict=True))
    return dot / math.sqrt(sum(p * p for p in x)) / math.sqrt(sum(q * q for q in y))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_nearest_is_the_best_of_a_loop(n: int, m: int, seed: int) -> None:
    images, train = random(n, seed=seed), random(m, seed=seed + 1000)
    similarity, index = nearest(images, train)
    assert similarity.shape == index.shape == (n,)
    for row in range(n):
        cosines = [cosine(images[row], train[column]) for column in range(m)]
        assert index[row] == max(range(m), key=cosines.__getitem__)
        assert float(similarity[row]) == pytest.approx(max(cosines), abs=1e-12)


def test_a_copy_is_found_whatever_its_length() -> None:
    train = random(5)
    similarity, index = nearest(train[[3, 0]] * 7, train)
    assert index.tolist() == [3, 0]
    torch.testing.assert_close(similarity, torch.ones(2, dtype=torch.float64))
    assert similarity.max() <= 1


def test_the_first_of_equally_near_pictures_is_named() -> None:
    picture = torch.tensor([[1.0, 2.0]])
    _, index = nearest(picture, torch.cat([-picture, picture, picture]))
    assert index.tolist() == [1]


def test_rows_do_not_depend_on_each_other() -> None:
    images, train = random(50), random(23, seed=1)
    whole, _ = nearest(images, train)
    single = torch.cat([nearest(image[None], train)[0] for image in images])
    torch.testing.assert_close(whole, single, rtol=0, atol=1e-12)


def test_no_images_have_no_neighbours() -> None:
    similarity, index = nearest(random(0), random(3))
    assert similarity.shape == index.shape == (0,)


def test_no_training_picture_is_refused() -> None:
    with pytest.raises(UserError, match="no training picture to compare with: give the training"):
        nearest(random(2), random(0))


@pytest.mark.parametrize("shape", [(2, 5), (6,)])
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="are needed"):
        nearest(random(2), torch.zeros(shape))


@given(st.integers(2, 9), st.integers(0, 99))
def test_diversity_is_the_mean_of_a_loop(n: int, seed: int) -> None:
    embeddings = random(n, seed=seed)
    pairs = [(a, b) for a in range(n) for b in range(a)]
    mean = sum(cosine(embeddings[a], embeddings[b]) for a, b in pairs) / len(pairs)
    assert pairwise_diversity(embeddings) == pytest.approx(1 - mean, abs=1e-12)


def test_diversity_at_its_marks() -> None:
    assert pairwise_diversity(random(1).repeat(4, 1)) == pytest.approx(0, abs=1e-12)
    assert pairwise_diversity(torch.eye(5)) == pytest.approx(1, abs=1e-12)
    assert pairwise_diversity(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])) == pytest.approx(2)


@pytest.mark.parametrize("count", [0, 1])
def test_diversity_of_one_image_is_refused(count: int) -> None:
    with pytest.raises(UserError, match=f"at least 2 images of a prompt, not {count}: add seeds"):
        pairwise_diversity(random(count))
