import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from worldvla_model import masks
from worldvla_model.masks import MaskError
from worldvla_tokenizers import Vocabulary

V = Vocabulary.published()
PUBLISHED_NAMES = {"v1": "action_isolated_everywhere", "v2": "first_image_only", "v3": "action_isolated"}


@pytest.mark.parametrize("version", PUBLISHED_NAMES)
def test_bit_equal_to_the_published_masks(published, version):
    reference = published.arrays("masks")
    for number, ids in enumerate(published.json("mask_sequences")):
        packed = reference[f"{number}_{version}"]
        expected = np.unpackbits(packed, axis=1, count=len(ids)).astype(bool)
        mask = masks.dense(PUBLISHED_NAMES[version], torch.tensor([ids]), V)[0].numpy()
        np.testing.assert_array_equal(mask, expected, err_msg=f"sequence {number}")


@pytest.mark.parametrize("strategy", masks.STRATEGIES.values(), ids=masks.STRATEGIES)
def test_what_the_docstrings_draw_is_true(strategy):
    rows = [line.split() for line in strategy.__doc__.splitlines() if set(line.split()[1:]) <= {"1", "."}]
    drawn = {name: cells for name, *cells in filter(None, rows)}
    image, action = [V.boi, 50, V.eoi], [V.boa, 10_100, V.eoa]
    blocks = {"w": [20_000] * 3, "I": image, "a": action, "b": action, "J": image, "c": action, "d": action}
    assert list(drawn) == list(blocks)
    ids = [token for block in blocks.values() for token in block]
    mask = masks.dense(strategy, torch.tensor([ids]), V)[0]
    for n, cells in enumerate(drawn.values()):
        for k, cell in enumerate(cells):
            block = mask[3 * n : 3 * n + 3, 3 * k : 3 * k + 3]
            expected = torch.ones(3, 3).tril() if n == k else torch.full((3, 3), int(cell == "1"))
            assert torch.equal(block, expected.bool()), (n, k)


def slow_blocks(ids, begin, end):
    """(start, stop) of each block, both inclusive: SPEC §6 read aloud."""
    starts = [i for i, token in enumerate(ids) if token == begin]
    ends = [i for i, token in enumerate(ids) if token == end]
    if len(ends) == len(starts) + 1:
        ends = ends[:-1]
    if len(starts) == len(ends) + 1:
        ends = [*ends, len(ids) - 1]
    return list(zip(starts, ends, strict=True))


def oracle(name, ids):
    actions = slow_blocks(ids, V.boa, V.eoa)
    images = slow_blocks(ids, V.boi, V.eoi)
    mask = np.tril(np.ones((len(ids), len(ids)), dtype=bool))
    if name == "causal":
        return mask
    for n, (start, stop) in enumerate(actions):
        if name == "action_isolated" and images and start < images[-1][1]:
            continue
        for row in range(start, stop + 1):
            for earlier in actions[:n]:
                mask[row, earlier[0] : earlier[1] + 1] = False
            if name == "first_image_only":
                for image in images[1:]:
                    if image[0] < start:
                        mask[row, image[0] : image[1] + 1] = False
    return mask


blocks = st.one_of(
    st.integers(0, 4).map(lambda n: [20_000] * n),
    st.just([V.eot]),
    st.integers(0, 5).map(lambda n: [V.boi, *[50] * n, V.eoi]),
    st.integers(0, 5).map(lambda n: [V.boa, *[10_100] * n, V.eoa]),
)
tails = st.sampled_from([[], [V.boa], [V.boa, 10_100, 10_101], [V.boi, V.grid(1), 7]])
sequences = st.tuples(st.lists(blocks, min_size=1, max_size=9), tails).map(
    lambda parts: [V.bos, *(token for block in parts[0] for token in block), *parts[1]]
)


@settings(max_examples=40)  # a mask of torch's own takes most of each
@given(sequences, st.sampled_from(sorted(masks.STRATEGIES)))
def test_dense_mask_equals_function_equals_oracle(ids, name):
    tensor = torch.tensor([ids])
    dense = masks.dense(name, tensor, V)[0]
    np.testing.assert_array_equal(dense.numpy(), oracle(name, ids))
    rule = masks.mask_function(name, masks.positions(tensor, V))
    made = create_mask(rule, 1, None, len(ids), len(ids), device="cpu")[0, 0]
    assert torch.equal(made, dense)


@settings(max_examples=40)  # a mask of torch's own takes most of each
@given(sequences, st.data())
def test_rows_of_new_tokens_are_rows_of_the_whole_mask(ids, data):
    past = data.draw(st.integers(0, len(ids) - 1))
    name = data.draw(st.sampled_from(sorted(masks.STRATEGIES)))
    where = masks.positions(torch.tensor([ids]), V)
    whole = masks.attend(name, where)
    assert torch.equal(masks.attend(name, where, first_query=past), whole[:, past:])
    rule = masks.mask_function(name, where, first_query=past)
    made = create_mask(rule, 1, None, len(ids) - past, len(ids), device="cpu")[:, 0]
    assert torch.equal(made, whole[:, past:])


@settings(max_examples=40)
@given(sequences, st.data())
def test_rows_of_ids_in_turn_are_those_of_what_is_known_by_then(ids, data):
    name = data.draw(st.sampled_from(sorted(masks.STRATEGIES)))
    known = data.draw(st.integers(1, len(ids)))
    first = data.draw(st.integers(0, len(ids) - 1))
    try:
        found = masks.attend_in_turn(name, torch.tensor([ids]), V, known=known, first_query=first)[0]
        for row in range(first, len(ids)):
            known_then = max(known, row + 1)
            expected = masks.dense(name, torch.tensor([ids[:known_then]]), V)[0, row]
            assert torch.equal(found[row - first], torch.nn.functional.pad(expected, (0, len(ids) - known_then)))
    except MaskError:
        pass  # begun within another block


def test_batches_and_padding():
    one = [V.bos, V.boi, 5, V.eoi, V.boa, 10_100, V.eoa, V.boa, 10_100, V.eoa]
    two = [V.bos, V.boi, 5, V.eoi, V.boa, 10_100, V.eoa]
    padded = torch.tensor([one, [V.pad] * 3 + two])
    keys = torch.tensor([[1] * 10, [0] * 3 + [1] * 7]).bool()
    mask = masks.attend("action_isolated", masks.positions(padded, V), keys=keys)
    assert torch.equal(mask[0], masks.dense("action_isolated", torch.tensor([one]), V)[0])
    assert torch.equal(mask[1, 3:, 3:], masks.dense("action_isolated", torch.tensor([two]), V)[0])
    assert not mask[1, 3:, :3].any()
    assert mask.any(dim=-1).all()  # no row is empty: softmax would give NaN


def test_own_strategy_plugs_in():
    def last_image_only(query, key):
        return masks.causal(query, key) & ((key.image < 0) | (key.image == query.last_image))

    ids = torch.tensor([[V.bos, V.boi, 5, V.eoi, V.boi, 6, V.eoi, V.eot, V.boa]])
    mask = masks.dense(last_image_only, ids, V)[0]
    assert mask[8].tolist() == [True, False, False, False, True, True, True, True, True]
    assert mask[3].tolist() == [True] * 4 + [False] * 5


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(MaskError, match="'isolated'; allowed: causal, action_isolated, "):
        masks.dense("isolated", torch.tensor([[0]]), V)


@pytest.mark.parametrize("ids", [[V.boa, V.boa], [V.eoi, V.eoi], [V.boi, V.boi, V.boi, V.eoi]])
def test_blocks_that_do_not_nest(ids):
    with pytest.raises(MaskError, match=r"sequence 1: \d tokens .* at most one may lack its partner"):
        masks.dense("action_isolated", torch.tensor([[0] * len(ids), ids]), V)


def test_no_host_synchronisation_off_the_cpu():
    """On the meta device any attempt to read a value raises."""
    ids = torch.zeros(2, 16, dtype=torch.long, device="meta")
    for name in masks.STRATEGIES:
        assert masks.dense(name, ids, V).shape == (2, 16, 16)
