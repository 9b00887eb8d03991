import pytest

from worldvla_libero.evaluation.records import SuccessRate
from worldvla_libero.nano.card import Measured, card, tables

MEASURED = Measured(
    success={
        ("libero_object", "lift"): SuccessRate(15, 20, 0),
        ("libero_spatial", "push"): SuccessRate(5, 19, 1),
    },
    action_l1=(0.1, 0.2),
    psnr=dict.fromkeys(("predicted", "reconstructed", "copied", "copied_tokens"), (30.0, 31.0)),
    weights_bytes=(15_000_000, 4_400_000),
    image_size=128,
    training={
        "recipe": {
            "name": "nano",
            "history": 2,
            "chunk": 5,
            "attention": "causal",
            "suites": ["libero_object", "libero_spatial"],
        },
        "samples": {"action": 100, "world": 50},
        "parameters": 7_000_000,
        "seconds": 7200,
        "steps": 10,
        "machine": "2 threads",
    },
    tokenizer_training={"parameters": 2_000_000, "seconds": 3600, "steps": 7},
    versions={"torch": "2"},
)


@pytest.mark.parametrize(
    "row",
    [
        "| libero_object: lift | 75 % (15/20) | 53 … 89 % |",  # Wilson's interval of 15 in 20
        "| libero_spatial: push | 26 % (5/19), 1 errors |",
        "| **all** | 51 % (20/39), 1 errors |",
        "| mean absolute error of chunks of 5 actions | 0.1500 | 0.1000 … 0.2000 |",
        "30.50 dB | 30.00 … 31.00 |",
        "| imagined over the frame before, as it is | +0.00 dB | +0.00 … +0.00 |",
        "| parameters | 7,000,000 | 2,000,000 |",
        "| on disk | 15.0 MB | 4.4 MB |",
        "| training | 2.0 h | 1.0 h |",
    ],
)
def test_tables_of_a_model_card(row):
    assert row in tables(MEASURED)


def test_a_card_says_what_was_done():
    text = card("nano", MEASURED)
    assert tables(MEASURED) in text
    assert "step limits: 280 on libero_object, 220 on libero_spatial" in " ".join(text.split())
    assert "100 action and 50 world samples; trained on 2 threads" in " ".join(text.split())
