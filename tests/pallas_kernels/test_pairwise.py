from itertools import combinations, product

from tests.pallas_kernels.cases import pairwise


def test_pairwise_holds_every_pair_in_few_choices():
    options = {"a": [1, 2, 3], "b": "xyz", "c": [None, 0], "d": [True, False]}
    choices = pairwise(options)
    for one, other in combinations(options, 2):
        for x, y in product(options[one], options[other]):
            assert any(choice[one] == x and choice[other] == y for choice in choices), (one, x, other, y)
    assert len(choices) <= 12  # of 36; 9 is the least, for the 3 x 3 pairs of a and b
    assert choices == pairwise(options)
