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
    parts = loss.means(loss.supervised_losses(logits, labels), "published", alpha=alpha)
    cross_entropy, z_loss = (parts[name].total / parts[name].weight for name in ("tokens", "z"))
    assert float(cross_entropy) == pytest.approx(reference[f"loss_{name}"], abs=1e-5)
    assert float(z_loss) == pytest.approx(reference[f"zloss_{name}"], rel=1e-5)


def test_forward_gives_the_published_loss(published, model, batch):
    reference = published.json("losses")
    ids, labels = batch
    with torch.inference_mode():
        value = float(model(ids, labels=labels).loss)
    assert value == pytest.approx(reference["loss_weighted"] + 1e-5 * reference["zloss_weighted"], abs=1e-5)


def test_published_weights_are_off_by_one_as_published():
    logits = torch.randn(1, 5, 9_000, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, 3, 8_194, 8_195, 8_196]])
    terms = functional.cross_entropy(logits[0, :4], labels[0, 1:], reduction="none")
    expected = (0.04 * terms[0] + 0.04 * terms[1] + terms[2] + terms[3]) / 2.08
    parts = loss.means(loss.supervised_losses(logits, labels), "published")
    torch.testing.assert_close(loss.combine(parts, z_loss_weight=0.0), expected)


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

    def paper(rows, z_loss_weight=0.0):
        losses = loss.supervised_losses(logits[rows], labels[rows])
        return loss.combine(loss.means(losses, "paper", is_world=is_world[rows]), z_loss_weight=z_loss_weight)

    everything = slice(None)
    torch.testing.assert_close(paper(everything), action + 0.04 * world)
    torch.testing.assert_close(paper(slice(1)), terms[0].sum() / 4)
    with_z = paper(everything, z_loss_weight=0.5)
    z = (logits[:, :-1].logsumexp(-1) ** 2)[labels[:, 1:] != -100].mean()
    torch.testing.assert_close(with_z, action + 0.04 * world + 0.5 * z)


def test_bad_input():
    with pytest.raises(ValueError, match="supervise no token"):
        loss.supervised_losses(torch.zeros(1, 3, 5), torch.full((1, 3), -100))
    with pytest.raises(ValueError, match=r"logits \(1, 3, 5\), labels \(1, 4\)"):
        loss.supervised_losses(torch.zeros(1, 3, 5), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"hidden \(1, 3, 5\), labels \(1, 4\)"):
        loss.chunked_losses(torch.zeros(1, 3, 5), torch.zeros(7, 5), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="chunk is 0; allowed: 1 and above"):
        loss.chunked_losses(torch.zeros(1, 3, 5), torch.zeros(7, 5), torch.zeros(1, 3, dtype=torch.long), chunk=0)
    losses = loss.supervised_losses(torch.zeros(1, 3, 5), torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="needs is_world"):
        loss.means(losses, "paper")
    with pytest.raises(ValueError, match="rule is 'mine'; allowed: 'published', 'paper'"):
        loss.means(losses, "mine")


@pytest.mark.parametrize("rule", ["published", "paper"])
def test_pieces_of_a_batch_add_up_to_the_whole(rule):
    logits = torch.randn(4, 6, 9_000, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 9_000, (4, 6), generator=torch.Generator().manual_seed(1))
    labels[:2, :3] = loss.IGNORED
    is_world = torch.tensor([True, False, False, True])

    def parts(rows):
        losses = loss.supervised_losses(logits[rows], labels[rows])
        return loss.means(losses, rule, is_world=is_world[rows])

    pieces, whole = [parts(slice(0, 1)), parts(slice(1, 4))], parts(slice(None))
    weights = {name: sum(piece[name].weight for piece in pieces) for name in whole}
    total = sum(loss.combine(piece, weights=weights) for piece in pieces)
    torch.testing.assert_close(total, loss.combine(whole))


@pytest.mark.parametrize("rule", ["published", "paper"])
@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_chunks_of_supervised_positions_give_the_loss_and_gradients_of_all_logits(rule, chunk):
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(3, 20, 16, generator=generator), torch.randn(9_000, 16, generator=generator)
    labels = torch.randint(0, 9_000, (3, 20), generator=generator)
    labels[0, 3:] = labels[2, :11] = loss.IGNORED
    is_world = torch.tensor([True, False, True])

    def grads(score):
        states, weight = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        value = loss.combine(loss.means(score(states, weight), rule, is_world=is_world))
        value.backward()
        return value.detach(), states.grad, weight.grad

    full = grads(lambda states, weight: loss.supervised_losses(states @ weight.T, labels))
    ours = grads(lambda states, weight: loss.chunked_losses(states, weight, labels, chunk=chunk))
    for found, expected in zip(ours, full, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_training_returns_the_loss_of_all_logits_without_them(model, batch):
    ids, labels = batch
    with torch.inference_mode():
        whole, skipped = model(ids, labels=labels), model(ids, labels=labels, skip_logits=True)
    assert skipped.logits is None
    torch.testing.assert_close(skipped.loss, whole.loss, rtol=0, atol=1e-5)
    assert torch.equal(skipped.losses.labels, whole.losses.labels)
    assert torch.equal(skipped.losses.predicted, whole.losses.predicted)
