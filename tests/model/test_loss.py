import pytest
import torch
from torch.nn import functional

from worldvla_model import loss


@pytest.fixture(scope="module")
def batch(published):
    samples = published.samples(size=128)
    chosen = [samples[i] for i in published.json("losses")["loss_batch"]]
    length = max(len(s["tokens"]) for s in chosen)
    ids = torch.tensor([s["tokens"] + [0] * (length - len(s["tokens"])) for s in chosen])
    labels = torch.tensor([s["labels"] + [-100] * (length - len(s["labels"])) for s in chosen])
    return ids, labels


@pytest.mark.parametrize(
    ("name", "alpha", "attention"),
    [("plain", 1.0, "action_isolated"), ("weighted", 0.04, "action_isolated"), ("causal", 1.0, "causal")],
)
def test_losses_of_the_published_code(published, model, batch, name, alpha, attention):
    reference = published.json("losses")
    ids, labels = batch
    with torch.inference_mode():
        logits = model(ids, attention=attention).logits
    cross_entropy = loss.published_loss(logits, labels, alpha=alpha, z_loss_weight=0.0)
    z_loss = loss.supervised_losses(logits, labels).squared_logsumexp.mean()
    assert float(cross_entropy) == pytest.approx(reference[f"loss_{name}"], rel=1e-5)
    assert float(z_loss) == pytest.approx(reference[f"zloss_{name}"], rel=1e-5)


def test_forward_gives_the_published_loss(published, model, batch):
    reference = published.json("losses")
    ids, labels = batch
    with torch.inference_mode():
        value = float(model(ids, labels=labels).loss)
    assert value == pytest.approx(reference["loss_weighted"] + 1e-5 * reference["zloss_weighted"], rel=1e-5)


def test_published_weights_are_off_by_one_as_published():
    logits = torch.randn(1, 5, 9_000, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, 3, 8_194, 8_195, 8_196]])
    terms = functional.cross_entropy(logits[0, :4], labels[0, 1:], reduction="none")
    expected = (0.04 * terms[0] + 0.04 * terms[1] + terms[2] + terms[3]) / 2.08
    torch.testing.assert_close(loss.published_loss(logits, labels, z_loss_weight=0.0), expected)


def test_paper_loss_takes_each_mean_over_its_own_tokens():
    logits = torch.randn(3, 6, 50, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor(
        [[-100, -100, 5, 6, 7, 8], [-100, 1, 2, 3, -100, -100], [-100, -100, -100, -100, -100, 9]]
    )
    terms = functional.cross_entropy(logits[:, :-1].reshape(-1, 50), labels[:, 1:].reshape(-1), reduction="none")
    terms = terms.view(3, 5)
    action = (terms[0].sum() + terms[2].sum()) / 5
    world = terms[1].sum() / 3
    is_world = torch.tensor([False, True, False])
    torch.testing.assert_close(loss.paper_loss(logits, labels, is_world), action + 0.04 * world)
    torch.testing.assert_close(loss.paper_loss(logits[:1], labels[:1], is_world[:1]), terms[0].sum() / 4)
    with_z = loss.paper_loss(logits, labels, is_world, z_loss_weight=0.5)
    z = (logits[:, :-1].logsumexp(-1) ** 2)[labels[:, 1:] != -100].mean()
    torch.testing.assert_close(with_z, action + 0.04 * world + 0.5 * z)


def test_bad_input():
    with pytest.raises(ValueError, match="supervise no token"):
        loss.supervised_losses(torch.zeros(1, 3, 5), torch.full((1, 3), -100))
    with pytest.raises(ValueError, match=r"logits \(1, 3, 5\), labels \(1, 4\)"):
        loss.supervised_losses(torch.zeros(1, 3, 5), torch.zeros(1, 4, dtype=torch.long))
